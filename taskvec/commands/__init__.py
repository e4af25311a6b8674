"""What the command line does: each file one command, without argument parsing."""
