"""``python -m liger_ops``."""

import sys

from liger_ops.cli import main

if __name__ == "__main__":
    sys.exit(main())
