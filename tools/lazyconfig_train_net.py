#!/usr/bin/env python3
"""Train or evaluate a lazy config: `d2kit train-lazy`, with the datasets of ``project``."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from d2kit.cli.jobs import lazy_parser as parser
from d2kit.cli.jobs import run, train_lazy_main
from project import register_all

__all__ = ["main", "parser"]


def main(args: argparse.Namespace) -> Mapping[str, Any]:
    """Train or evaluate in one process, as Detectron2's script of this name has it."""
    return run(args, register_all)


if __name__ == "__main__":
    train_lazy_main(register=register_all)
