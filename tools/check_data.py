#!/usr/bin/env python3
"""Check a dataset in COCO format: `d2kit check`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from d2kit.cli.check_data import main

if __name__ == "__main__":
    sys.exit(main())
