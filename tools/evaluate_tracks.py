#!/usr/bin/env python3
"""HOTA, IDF1, MOTA of tracks: `d2kit evaluate-tracks`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from d2kit.cli.evaluate import evaluate_tracks_main as main

if __name__ == "__main__":
    sys.exit(main())
