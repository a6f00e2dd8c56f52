#!/usr/bin/env python3
"""Measure d2kit beside torchvision: `d2kit benchmark`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from d2kit.cli.benchmark import benchmark_main as main

if __name__ == "__main__":
    sys.exit(main())
