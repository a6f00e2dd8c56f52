#!/usr/bin/env python3
"""Train or evaluate a model from a YAML config: `d2kit train`, with the datasets of ``project``."""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from d2kit.cli.train import Trainer, argument_parser, run, setup, train_net_main
from project import register_all

__all__ = ["Trainer", "argument_parser", "main", "setup"]


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Train or evaluate in one process, as Detectron2's script of this name has it."""
    return run(args, register_all)


if __name__ == "__main__":
    train_net_main(register=register_all)
