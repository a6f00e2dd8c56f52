#!/usr/bin/env python3
"""Do a step again whose loss was not finite: `d2kit replay`, with the datasets of ``project``."""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from d2kit.cli.jobs import replay_main
from project import register_all

main = partial(replay_main, register=register_all)

if __name__ == "__main__":
    sys.exit(main())
