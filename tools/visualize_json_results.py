#!/usr/bin/env python3
"""Draw results beside the truth: `d2kit visualize-results`, with the datasets of ``project``."""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from d2kit.cli.visualize import visualize_results_main
from project import register_all

main = partial(visualize_results_main, register=register_all)

if __name__ == "__main__":
    sys.exit(main())
