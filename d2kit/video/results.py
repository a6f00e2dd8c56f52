"""The set of files of a tracking: all of one run, or none of them.

Privacy rests on it: what an earlier run left under these names, perhaps unblurred, is gone before
the first frame of the next one is read, and ``summary.json`` lists each file with its digest.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

__all__ = ["FRAMES", "clear_results", "disk_errors", "partial_name", "publish"]

FRAMES = "frames"
"""Folder of the kept frames."""

SUMMARY = "summary.json"
_FILES = ("annotated.mp4", "tracks.csv", "tracks.json", "mot.txt", SUMMARY)
_FRAME = re.compile(r"\d{6,}\.jpg")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def partial_name(path: Path) -> Path:
    """Return the name that a file has while it is written."""
    return path.with_name(f".{path.name}.partial")


def _listed(path: Path) -> set[str] | None:
    """Return the names that a summary vouches for; None where it is none of ours."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or "frames_from_store" not in found:
        return None
    files = found.get("files", dict.fromkeys(_FILES))  # before there was a list
    return {SUMMARY, *files} if isinstance(files, dict) else {SUMMARY}


def clear_results(folder: Path, source: str, *, frames: bool) -> None:
    """Remove what earlier runs left under the names of results, killed ones included.

    Stored detections stay: they hold no picture.

    Args:
        folder: of the results; nobody else may write to it.
        source: the input of the next run.
        frames: whether pictures under ``frames/`` matter to it: it writes some, or hides people.

    Raises:
        ValueError: if a file has the name of a result and no summary lists it, or if the input is
            one of the results; nothing is removed.
    """
    summaries = [folder / SUMMARY, partial_name(folder / SUMMARY)]
    ours = set().union(*(_listed(path) or () for path in summaries))
    there = [folder / name for name in _FILES]
    kept = folder / FRAMES
    if kept.is_dir():
        there += sorted(p for p in kept.iterdir() if _FRAME.fullmatch(p.name))
    there = [path for path in there if os.path.lexists(path)]
    old = [path for path in there if path.relative_to(folder).as_posix() in ours]
    strange = [p for p in there if p not in old and (frames or p.parent == folder)]
    if strange:
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        raise ValueError(
            f"--output {folder}: {strange[0].relative_to(folder)}{more} would be overwritten, and "
            "no summary.json there lists it as the result of a tracking; move it away, or choose "
            "another --output"
        )
    _keep_input(folder, source, old)
    for path in old:
        path.unlink()
    for name in (*_FILES, FRAMES):
        hidden = partial_name(folder / name)
        if hidden.is_dir():
            shutil.rmtree(hidden)
        else:
            hidden.unlink(missing_ok=True)
    with suppress(OSError):  # it holds other files
        kept.rmdir()


def _keep_input(folder: Path, source: str, old: list[Path]) -> None:
    """Refuse to remove what is to be read."""
    if not source or not old:
        return
    wanted = Path(source).resolve()
    if any(wanted in (path.resolve(), path.parent.resolve()) for path in old if path.exists()) and (
        wanted != folder.resolve()
    ):
        raise ValueError(
            f"--input {source} is a result of an earlier tracking in --output {folder}, which "
            "this one replaces; choose another --output"
        )


def publish(folder: Path, names: list[str], summary: dict[str, Any]) -> None:
    """Give all results their names, the summary last; or remove them all.

    Args:
        folder: where they wait under hidden names.
        names: of the files, and `FRAMES`.
        summary: is written, with ``files``: bytes and SHA-256 of each, added to it. Stored
            detections in the folder are listed too.

    Raises:
        OSError: with path, and sizes where the disk is full.
    """
    waiting: dict[str, Path] = {}
    for name in names:
        hidden = partial_name(folder / name)
        inside = sorted(hidden.iterdir()) if hidden.is_dir() else []
        waiting |= {f"{name}/{p.name}": p for p in inside} if hidden.is_dir() else {name: hidden}
    store = folder / "detections.jsonl.gz"
    listed = waiting | ({store.name: store} if store.is_file() else {})
    summary["files"] = {name: _digest(path) for name, path in listed.items()}
    placed: list[Path] = []
    hidden = partial_name(folder / SUMMARY)
    try:
        with disk_errors(folder / SUMMARY), hidden.open("w", encoding="utf-8") as file:
            json.dump(summary, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        if FRAMES in names:
            (folder / FRAMES).mkdir(exist_ok=True)
        for name, path in (*waiting.items(), (SUMMARY, hidden)):
            with disk_errors(folder / name):
                os.replace(path, folder / name)
            placed.append(folder / name)
    except BaseException:
        for path in (*placed, hidden):
            path.unlink(missing_ok=True)
        with suppress(OSError):
            (folder / FRAMES).rmdir()
        raise
    with suppress(OSError):
        partial_name(folder / FRAMES).rmdir()


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else None
        if digest is None:  # Python 3.10
            digest = hashlib.sha256()
            while block := file.read(2**20):
                digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Let a refusal of the disk name the file, and on a full disk the sizes.

    Args:
        path: the file by its final name; it may still have its hidden one.

    Raises:
        OSError: in place of any error of the block that has a number of the system.
    """
    try:
        yield
    except Exception as error:
        number = getattr(error, "errno", None)
        # FFmpeg's own numbers are negative or far above those of the system
        if not isinstance(number, int) or number not in errno.errorcode:
            raise
        reason = os.strerror(number)
        if number in _FULL:
            hidden = partial_name(path)
            size = max((p.stat().st_size for p in (hidden, path) if p.is_file()), default=0)
            free = shutil.disk_usage(path.parent if path.parent.is_dir() else path.parents[1]).free
            reason += (
                f": wrote {size:,} bytes, {free:,} bytes are free in the folder; free some space, "
                "or choose another --output. The stored detections stay: the same command goes on "
                "from them"
            )
        raise OSError(number, reason, str(path)) from error
