"""Finds out which annotation format a folder holds."""

from __future__ import annotations

import csv
from collections.abc import Callable
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from d2kit.curate.conversion import (
    IMAGE_FOLDERS,
    READERS,
    SPLITS,
    coco_files,
    image_files,
    is_label_studio,
    is_table,
    is_via,
    read_text,
)
from d2kit.data.datasets.validate import DatasetError, read_json

__all__ = ["FoundFormat", "detect_format"]

LOOKED_AT = 40
"""Files of a kind that are opened to tell what they are."""


class FoundFormat(NamedTuple):
    """A format that a folder holds.

    Args:
        name: key of `d2kit.curate.conversion.READERS`.
        path: what its reader takes: the folder, or one file.
        evidence: what was seen, for messages.
    """

    name: str
    path: Path
    evidence: str


def detect_format(data: str | PathLike[str], chosen: str = "") -> FoundFormat:
    """Return the format of a folder (or annotation file).

    Args:
        data: folder of pictures and annotations, or an annotation file.
        chosen: format that the user names; it decides where several are there.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: an unknown `chosen`; none or several formats: the message has the option that
            answers.
    """
    path = Path(data)
    if not path.exists():
        raise FileNotFoundError(
            f"'{path}' does not exist; expected a folder of pictures and labels"
        )
    if chosen and chosen not in READERS:
        raise ValueError(f"format: expected one of {', '.join(READERS)}, got '{chosen}'")
    found = [f for name, look in LOOKS.items() if (f := _seen(name, look, path))]
    if chosen:
        own = [f for f in found if f.name == chosen]
        return own[0] if own else FoundFormat(chosen, path, "named by the user")
    if len(found) > 1:
        lines = "".join(f"\n  --format {f.name}: {f.evidence}" for f in found)
        raise ValueError(f"'{path}' holds annotations in {len(found)} formats; which?{lines}")
    if found:
        return found[0]
    if path.is_dir() and (classes := _class_folders(path)):
        raise ValueError(
            f"'{path}' has a folder per class ({', '.join(classes[:5])}) and no annotations: it "
            "says what is on a picture, not where. A detector needs boxes (draw them with labelme, "
            "CVAT or Label Studio); --format folders trains with each whole image as one box"
        )
    pictures = len(image_files(path)) if path.is_dir() else 0
    raise DatasetError(
        f"'{path}': {pictures} pictures and no annotations in a known format ("
        f"{', '.join(READERS)}; docs/own_data.md has the layouts); --format says which it is"
    )


def _seen(
    name: str, look: Callable[[Path], tuple[Path, str] | None], path: Path
) -> FoundFormat | None:
    found = look(path)
    return FoundFormat(name, *found) if found else None


def _some(path: Path, suffix: str) -> list[Path]:
    """Return some files with an ending: the file itself, or those below the folder."""
    if path.is_file():
        return [path] if path.suffix.lower() == suffix else []
    files = (p for p in sorted(path.rglob(f"*{suffix}")) if not p.name.startswith("."))
    return list(islice(files, LOOKED_AT))


def _coco(path: Path) -> tuple[Path, str] | None:
    files = [path] if path.is_file() and path.suffix == ".json" else []
    files = coco_files(path) if path.is_dir() else [f for f in files if _has(f, "images")]
    if not files:
        return None
    return path, f"COCO JSON, {', '.join(f.name for f in files[:3])}"


def _has(file: Path, *keys: str) -> bool:
    try:
        return all(key in read_json(str(file), str(file)) for key in keys)
    except (ValueError, OSError):
        return False


def _labelme(path: Path) -> tuple[Path, str] | None:
    files = [f for f in _some(path, ".json") if _has(f, "shapes", "imagePath")]
    return (path, f"labelme, {files[0].name}, ...") if files else None


def _xml(path: Path, marks: tuple[str, ...]) -> Path | None:
    for file in _some(path, ".xml"):
        with open(file, "rb") as stream:
            start = stream.read(2**16)
        if all(mark.encode() in start for mark in marks):
            return file
    return None


def _voc(path: Path) -> tuple[Path, str] | None:
    file = _xml(path, ("<annotation", "<size", "<width")) if path.is_dir() else None
    if file is None or _xml(file, ("<annotations",)):
        return None
    return path, f"Pascal VOC, {file.name}, ..."


def _cvat(path: Path) -> tuple[Path, str] | None:
    file = _xml(path, ("<annotations", "<image "))
    return (file, f"CVAT for images, {file.name}") if file else None


def _yolo(path: Path) -> tuple[Path, str] | None:
    if path.is_file():
        return (path, "YOLO") if path.suffix in (".yaml", ".yml") else None
    for file in _some(path, ".txt"):
        lines = [line.split() for line in read_text(file).splitlines()[:3] if line.strip()]
        if lines and all(len(line) >= 5 and all(map(_is_number, line)) for line in lines):
            lists = ("*.yaml", "*.yml", "*.names", "classes.txt", "*.labels", "labels/classes.txt")
            return (
                (path, f"YOLO, {file.name}, ...")
                if any(any(path.glob(p)) or any(path.glob(f"*/{p}")) for p in lists)
                else None
            )
    return None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _one_of(
    path: Path, check: Callable[[Path], bool], suffixes: tuple[str, ...], title: str
) -> tuple[Path, str] | None:
    files = [f for suffix in suffixes for f in _some(path, suffix) if check(f)]
    if len(files) > 1:
        raise ValueError(
            f"'{path}' has {len(files)} files of {title} ({', '.join(f.name for f in files[:4])}): "
            "which? --data FILE names one"
        )
    return (files[0], f"{title}, {files[0].name}") if files else None


def _masks(path: Path) -> tuple[Path, str] | None:
    if not path.is_dir():
        return None
    if (path / "instances.json").is_file():
        return path, "mask PNGs, instances.json"
    for folder in sorted(p for p in path.rglob("*") if p.is_dir()):
        if "mask" in folder.name.lower() and any(folder.rglob("*.png")):
            return path, f"mask PNGs, {folder.name}/"
    return None


def _is_text_table(file: Path) -> bool:
    try:
        return is_table(file) and not is_via(file)
    except csv.Error:
        return False


LOOKS: dict[str, Callable[[Path], tuple[Path, str] | None]] = {
    "coco": _coco,
    "labelme": _labelme,
    "voc": _voc,
    "cvat": _cvat,
    "yolo": _yolo,
    "via": lambda path: _one_of(path, is_via, (".json", ".csv"), "VIA"),
    "labelstudio": lambda path: _one_of(path, is_label_studio, (".json",), "Label Studio"),
    "csv": lambda path: _one_of(path, _is_text_table, (".csv",), "CSV"),
    "masks": _masks,
}
"""Format -> function that returns what its reader takes and what was seen; None: not there."""


def _class_folders(path: Path) -> list[str]:
    """Return the folders of pictures that are named as no folder of images is."""
    names = {f.parent.name for f in image_files(path) if f.parent != path}
    return sorted(n for n in names if n.lower() not in (*IMAGE_FOLDERS, *SPLITS))
