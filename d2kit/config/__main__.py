"""``python -m d2kit.config explain|diff|print ...``; without any it prints docs/config.md."""

import sys

from d2kit.config.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
