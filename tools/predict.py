#!/usr/bin/env python3
"""Run a model on pictures: `d2kit predict`, with the datasets of ``project``."""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from d2kit.cli.predict import predict_main
from project import register_all

main = partial(predict_main, register=register_all)

if __name__ == "__main__":
    sys.exit(main())
