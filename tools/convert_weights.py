#!/usr/bin/env python3
"""Convert weights between libraries: `d2kit convert-weights`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from d2kit.cli.weights import convert_weights_main as main

if __name__ == "__main__":
    sys.exit(main())
