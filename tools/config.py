#!/usr/bin/env python3
"""Explain config keys, compare and print configs: `d2kit config`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from d2kit.cli.config import config_main as main

if __name__ == "__main__":
    sys.exit(main())
