"""`python -m taskvec`: the command line."""

import sys

from taskvec.cli import main

sys.exit(main())
