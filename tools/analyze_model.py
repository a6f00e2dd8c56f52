#!/usr/bin/env python3
"""Count what a model costs: `d2kit analyze`, with the datasets of ``project``."""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from d2kit.cli.analyze import analyze_main
from project import register_all

main = partial(analyze_main, register=register_all)

if __name__ == "__main__":
    sys.exit(main())
