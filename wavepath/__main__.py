"""`python -m wavepath` is the command `wavepath`."""

import sys

from wavepath.cli import main

if __name__ == "__main__":
    sys.exit(main())
