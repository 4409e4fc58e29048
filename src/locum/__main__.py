"""``python -m locum``."""

import sys

from locum.cli import main

if __name__ == "__main__":
    sys.exit(main())
