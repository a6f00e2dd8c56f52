"""``d2kit config``: explain keys, compare and print configs; executes nothing.

The same as ``python -m d2kit.config``, but it reads the configs in checkpoints too.
"""

from __future__ import annotations

import sys
from pathlib import Path

from d2kit.config import command


def recorded(checkpoint: Path) -> str:
    """Return the config of a checkpoint; torch is imported only where there is one to read."""
    from d2kit.checkpoint import recorded_config

    return recorded_config(checkpoint)


def config_main(argv: list[str] | None = None) -> int:
    """Run `d2kit.config.command.main` with a reader of checkpoints; return the exit code."""
    return command.main(sys.argv[1:] if argv is None else argv, recorded)
