"""Seconds and memory beside a peer or a floor: each module is a program, `python -m benchmarks.NAME --help`."""
