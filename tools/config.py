#!/usr/bin/env python3
"""Explain config keys, compare and print configs; executes nothing.

config.py explain SOLVER.BASE_LR "*NUM_CLASSES" SOLVER.EMA [--config-file CONFIG]
config.py diff output/a COCO-Detection/retinanet_R_50_FPN_1x.yaml
config.py print CONFIG [--changed] [--json] [KEY VALUE ...]

A config is a YAML file, the folder of a run, a name of the model zoo, or a checkpoint.
`python -m d2kit.config` is the same, but for checkpoints.
"""

from __future__ import annotations

import sys
from pathlib import Path

from d2kit.config.command import main


def recorded(checkpoint: Path) -> str:
    """Return the config of a checkpoint; torch is imported only where there is one to read."""
    from d2kit.checkpoint import recorded_config

    return recorded_config(checkpoint)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], recorded))
