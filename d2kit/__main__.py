"""``python -m d2kit VERB ...``, the same as ``d2kit VERB ...``."""

import sys

from d2kit.cli import main

if __name__ == "__main__":
    sys.exit(main())
