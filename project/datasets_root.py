"""Where prepared datasets lie."""

from __future__ import annotations

import os
from pathlib import Path


def datasets_root(root: str | os.PathLike | None = None) -> Path:
    """Return `root`, else ``$D2KIT_DATASETS``, else ``datasets/data`` below the working folder."""
    return Path(root or os.environ.get("D2KIT_DATASETS") or "datasets/data")
