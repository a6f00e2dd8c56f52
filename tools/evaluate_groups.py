#!/usr/bin/env python3
"""AP of each video with bootstrap intervals: `d2kit evaluate-groups`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from d2kit.cli.evaluate import evaluate_groups_main as main

if __name__ == "__main__":
    sys.exit(main())
