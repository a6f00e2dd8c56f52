#!/usr/bin/env python3
"""Do a training step again whose loss was not finite.

replay.py output/failed_step_0001234 [--import my_datasets] [--trainer my_package.train:MyTrainer]

The folder was written by the training that failed; it is named in its log.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
from pathlib import Path

import project
from d2kit.engine import DefaultTrainer, user_errors
from d2kit.engine.safety.replay import default_replay
from d2kit.utils.logger import setup_logger


def main() -> int:
    """Return 0 if the step fails again, 1 if its losses are finite now."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dump", type=Path, help="folder failed_step_... of a training")
    parser.add_argument(
        "--import",
        dest="modules",
        action="append",
        default=[],
        metavar="MODULE",
        help="module that registers datasets or models",
    )
    parser.add_argument("--trainer", default="", metavar="MODULE:CLASS", help="own trainer")
    args = parser.parse_args()
    with user_errors():
        setup_logger()
        project.register_all()
        for name in args.modules:
            importlib.import_module(name)
        kind = DefaultTrainer
        if args.trainer:
            module, _, name = args.trainer.partition(":")
            kind = getattr(importlib.import_module(module), name)
        losses = default_replay(args.dump, kind)
    print(json.dumps(losses))
    again = any(not math.isfinite(value) for rank in losses for value in rank.values())
    print("the step fails again" if again else "all losses are finite now")
    return 0 if again else 1


if __name__ == "__main__":
    raise SystemExit(main())
