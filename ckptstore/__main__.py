"""`python -m ckptstore`: the command line."""

import sys

from ckptstore.cli import main

if __name__ == "__main__":
    sys.exit(main())
