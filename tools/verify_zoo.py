#!/usr/bin/env python3
"""Evaluate published models: `d2kit verify-zoo`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from d2kit.cli.weights import verify_zoo_main as main

if __name__ == "__main__":
    sys.exit(main())
