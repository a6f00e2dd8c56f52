#!/usr/bin/env python3
"""Convert annotations between formats: `d2kit convert`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from d2kit.cli.data import convert_main as main

if __name__ == "__main__":
    sys.exit(main())
