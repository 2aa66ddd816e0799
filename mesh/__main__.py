"""`python -m mesh` and the `repertory` command."""

import sys

from mesh.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
