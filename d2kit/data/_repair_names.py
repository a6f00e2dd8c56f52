"""Finds the files of images whose names in a COCO JSON lead nowhere."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from d2kit.data.datasets._validate import path_problem

__all__ = ["moved_files"]


def moved_files(images: Iterable[Any], folder: str | os.PathLike[str]) -> dict[str, str]:
    """Return the names of files that lie elsewhere in the image folder than their entries say.

    Absolute paths of another machine, backslashes, folders too many or too few, and capitals are
    seen through; what fits two files is left as it is.

    Args:
        images: entries with `file_name`.
        folder: that the names are relative to.

    Returns:
        `file_name` -> the name to use instead; only of those that can be told.
    """
    root = Path(folder)
    names = [i.get("file_name") for i in images if isinstance(i, Mapping)]
    lost = {n for n in names if isinstance(n, str) and n and not _exists(n, root)}
    if not lost:
        return {}
    files = [p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()]
    whole: dict[str, list[str]] = {}
    last: dict[str, list[str]] = {}
    for file in files:
        whole.setdefault(file.lower(), []).append(file)
        last.setdefault(file.lower().rpartition("/")[2], []).append(file)
    found = {name: _nearest(name, whole, last) for name in lost}
    taken = [n for n in names if isinstance(n, str) and n not in lost]
    taken += [file for file in found.values() if file]
    return {name: file for name, file in found.items() if file and taken.count(file) == 1}


def _exists(name: str, root: Path) -> bool:
    return path_problem(name, os.fspath(root)) is None and (root / name).is_file()


def _nearest(name: str, whole: Mapping[str, list[str]], last: Mapping[str, list[str]]) -> str:
    """Return the only file that has most of the last parts of a name; nothing if there is none."""
    parts = name.replace("\\", "/").lower().split("/")
    for start in range(len(parts)):
        files = whole.get("/".join(parts[start:]), [])
        if files:
            return files[0] if len(files) == 1 else ""
    files = last.get(parts[-1], [])
    return files[0] if len(files) == 1 else ""
