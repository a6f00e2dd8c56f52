#!/usr/bin/env python3
"""Split a COCO JSON file into parts: `d2kit split`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from d2kit.cli.data import split_main as main

if __name__ == "__main__":
    sys.exit(main())
