"""`python -m vfmlab` is the command line."""

import sys

from vfmlab.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
