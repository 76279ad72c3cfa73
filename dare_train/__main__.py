"""`python -m dare_train`: the same as `dare-train`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
