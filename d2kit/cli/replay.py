"""Do a training step again whose loss was not finite.

d2kit replay output/failed_step_0001234 [--import my_datasets] [--trainer my.train:Trainer]

The folder was written by the training that failed; it is named in its log.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path

from d2kit.engine import DefaultTrainer, user_errors
from d2kit.engine.safety.replay import default_replay
from d2kit.utils.logger import setup_logger


def main(argv: list[str] | None = None, register: Callable[[], None] | None = None) -> int:
    """Return 0 if the step fails again, 1 if its losses are finite now.

    Args:
        argv: the command line; None: that of the process.
        register: makes datasets known by name, e.g. those of a checkout.
    """
    parser = argparse.ArgumentParser(
        prog="d2kit replay",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
    args = parser.parse_args(argv)
    with user_errors():
        setup_logger()
        if register is not None:
            register()
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
