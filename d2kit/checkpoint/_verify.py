"""Finds the newest checkpoint that is intact, by looking at the files themselves.

`torch.save` writes a zip archive with a CRC-32 of every tensor. torch does not check it when it
loads (a flipped bit goes unnoticed); here it is checked, at 1.7 GB/s, so that a file needs no
digest beside it and stays a plain checkpoint.
"""

import logging
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["damage", "newest_checkpoint", "oldest_first", "read_torch", "read_torch_of_mmengine"]

logger = logging.getLogger(__name__)

_NUMPY_MAKERS = ("_reconstruct", "scalar")


@dataclass(frozen=True, order=True)
class _Age:
    """When a checkpoint was made; the larger is the newer one.

    Args:
        run_started: when its training first began, seconds of `time.time`; 0: unknown, older than
            any. A later training in the same folder is newer, however short it is.
        iteration: index of the iteration done last; -1: unknown.
        modified: time of the file, nanoseconds.
    """

    run_started: float
    iteration: int
    modified: int


def read_torch(path: Path, *, mmap: bool = False) -> Any:
    """Load a file of `torch.save` onto the CPU, admitting tensors and plain values only."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap or None)


class _Inert:
    """Takes the place of an object of another library: does nothing, whatever is done with it."""

    def __new__(cls, *_: Any, **__: Any) -> "_Inert":
        """Make one, from any arguments."""
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


# MMEngine keeps the history of its log in a checkpoint, under "message_hub".
_MMENGINE_LOG = (
    "mmengine.logging.history_buffer.HistoryBuffer",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in _NUMPY_MAKERS),
    *("numpy.ndarray", "numpy.dtype", "builtins.getattr", "__builtin__.getattr"),
)


def read_torch_of_mmengine(path: Path) -> Any:
    """As `read_torch`, for files with MMEngine's log: nothing of it is imported, called or kept."""
    with torch.serialization.safe_globals([(_Inert, name) for name in _MMENGINE_LOG]):
        data = read_torch(path)
    if isinstance(data, dict):
        data.pop("message_hub", None)
    return data


def damage(path: Path) -> str:
    """Say what is wrong with the content of a checkpoint file; "" if it is intact."""
    try:
        if not zipfile.is_zipfile(path):
            read_torch(path)  # the format before torch 1.6 has no checksums
            return ""
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except Exception as error:  # a damaged archive raises nearly anything
        return f"{type(error).__name__}: {_first_line(error)}"
    return f"the checksum of its record {bad} is wrong" if bad else ""


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]


def _age(path: Path) -> _Age:
    """Return when a checkpoint was made; reads no tensor.

    Raises:
        Exception: of nearly any kind, if it is damaged.
    """
    if not zipfile.is_zipfile(path):
        raise ValueError("not a complete archive of torch.save")
    data = read_torch(path, mmap=True)
    if not isinstance(data, dict) or "model" not in data:
        raise ValueError("no dict with a key 'model'")
    trainer = data.get("trainer")
    found = data.get("iteration", trainer.get("iteration") if isinstance(trainer, dict) else None)
    started = data.get("run_started")
    return _Age(
        started if isinstance(started, float) else 0.0,
        found if isinstance(found, int) else -1,
        path.stat().st_mtime_ns,
    )


def oldest_first(paths: Iterable[Path]) -> list[Path]:
    """Sort checkpoints as `newest_checkpoint` does; what cannot be read comes before all others."""

    def age(path: Path) -> _Age:
        try:
            return _age(path)
        except Exception:  # see `damage`
            return _Age(-1.0, -1, 0)

    return sorted(paths, key=age)


def newest_checkpoint(folder: Path, trusted: dict[Path, tuple[int, int]]) -> Path | None:
    """Return the newest checkpoint in `folder` that is intact, or None.

    That is the one with the highest iteration, of the training that began last. Each damaged file
    that is met is named in a warning.

    Args:
        folder: holds ``*.pth`` files; need not exist.
        trusted: path -> (size, modification time in ns) of files known to be intact; the one
            returned is added.
    """
    candidates = []
    for path in folder.glob("*.pth") if folder.is_dir() else ():
        try:
            candidates.append((_age(path), path))
        except Exception as error:  # see `damage`
            reason = f"{type(error).__name__}: {_first_line(error)}"
            logger.warning("Checkpoint %s cannot be used (%s)", path, reason)
    for _, path in sorted(candidates, reverse=True):
        status = path.stat()
        mark = (status.st_size, status.st_mtime_ns)
        if trusted.get(path) == mark:
            return path
        problem = damage(path)
        if not problem:
            trusted[path] = mark
            return path
        logger.warning("Checkpoint %s is damaged (%s): using one before", path, problem)
    return None
