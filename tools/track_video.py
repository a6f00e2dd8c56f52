#!/usr/bin/env python3
"""Follow everybody through a video: `d2kit track`, with the datasets of ``project``."""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from d2kit.cli.predict import track_main
from project import register_all

main = partial(track_main, register=register_all)

if __name__ == "__main__":
    sys.exit(main())
