"""What every reader asks of other people's files: text, numbers within bounds, images by name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from math import isfinite
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from d2kit.data.datasets.validate import DatasetError, short
from d2kit.utils.file_io import IMAGE_SUFFIXES, MAX_IMAGE_PIXELS

SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val"}
SPLITS |= {"validation": "val", "test": "test", "testing": "test"}

IMAGE_FOLDERS = ("jpegimages", "pngimages", "images", "image", "imgs", "img", "pictures", "photos")
MAX_TEXT = 2**28
"""Most bytes of a text file of annotations that is read."""
MAX_SIDE = 2**20
"""Longest side of an image in pixels; the product is bounded by `MAX_IMAGE_PIXELS`."""
MAX_DIGITS = 40
"""Longest number in text; longer ones are garbage, and slow to read."""


def read_text(file: Path) -> str:
    """Return a text file of others, in UTF-8 with or without a byte order mark.

    Raises:
        DatasetError: too large, no plain file, or not UTF-8.
    """
    if not file.is_file():
        raise DatasetError(f"{file}: expected a text file; it is none")
    if file.stat().st_size > MAX_TEXT:
        raise DatasetError(f"{file}: {file.stat().st_size:,} bytes; expected at most {MAX_TEXT:,}")
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{file}: not a text file in UTF-8 ({error.reason} at byte {error.start}); save it "
            "in that encoding"
        ) from error


def check_numbers(values: Iterable[Any], where: str) -> list[float]:
    """Return finite numbers of text or JSON.

    Raises:
        DatasetError: one is none.
    """
    found = []
    for value in values:
        text = value if isinstance(value, str) else repr(value)
        try:
            number = float(text) if len(text) <= MAX_DIGITS else float("nan")
        except ValueError:
            number = float("nan")
        if not isfinite(number):
            raise DatasetError(f"{where}: expected finite numbers, got {short(value)}")
        found.append(number)
    return found


def check_size(width: object, height: object, where: str) -> tuple[int, int]:
    """Return the width and height of an image.

    Raises:
        DatasetError: they are no whole numbers that an image can have.
    """
    sides = []
    for key, value in (("width", width), ("height", height)):
        (side,) = check_numbers([value], f"{where}: {key}")
        if not side.is_integer() or not 0 < side <= MAX_SIDE:
            raise DatasetError(
                f"{where}: {key}: size: expected whole pixels from 1 to {MAX_SIDE}, got "
                f"{short(value)}"
            )
        sides.append(int(side))
    if sides[0] * sides[1] > MAX_IMAGE_PIXELS:
        raise DatasetError(
            f"{where}: size: {sides[0]} x {sides[1]} pixels; expected at most "
            f"{MAX_IMAGE_PIXELS:,} in all"
        )
    return sides[0], sides[1]


def check_reach(points: Iterable[float], width: int, height: int, where: str) -> None:
    """Check x, y, x, y, ... of an object: further out than an image's size is no labelling.

    Masks are drawn by native code, whose time and memory grow with the length of an outline.

    Raises:
        DatasetError: a coordinate is not finite or lies too far out.
    """
    for i, value in enumerate(points):
        side = (width, height)[i % 2]
        if not -side <= value <= 2 * side:
            raise DatasetError(
                f"{where}: {'xy'[i % 2]} = {value:g} is far outside of the image of {width} x "
                f"{height} pixels"
            )


def image_root(path: Path) -> Path:
    """Return the folder in `path` that is named as folders of images are, else `path`."""
    if not path.is_dir():
        return path.parent
    found = {p.name.lower(): p for p in path.iterdir() if p.is_dir()}
    return next((found[name] for name in IMAGE_FOLDERS if name in found), path)


class ImageFinder:
    """Finds the file that an annotation means, whatever folder its author had it in.

    Args:
        root: folder of the images; all below it are looked at once.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.names: set[str] = set()
        self._by_name: dict[str, list[str]] = {}
        self._by_stem: dict[str, list[str]] = {}
        for path in image_files(root):
            name = path.relative_to(root).as_posix()
            self.names.add(name)
            self._by_name.setdefault(path.name.lower(), []).append(name)
            self._by_stem.setdefault(path.stem.lower(), []).append(name)

    def forget(self, files: Iterable[Path]) -> None:
        """Take files for no images from now on: they are masks."""
        for path in files:
            if self.root in path.parents:
                name = path.relative_to(self.root).as_posix()
                self.names.discard(name)
                for table, key in ((self._by_name, path.name), (self._by_stem, path.stem)):
                    kept = [n for n in table.get(key.lower(), []) if n != name]
                    table[key.lower()] = kept

    def find(self, given: str, near: Path | None = None) -> str | None:
        """Return the image's name relative to the root, or None.

        Args:
            given: as the annotation has it: a path of any machine, perhaps coded as in URLs.
            near: folder of the annotation file, which a name may be relative to.
        """
        for text in dict.fromkeys((given, unquote(re.split(r"[?#]", given)[0]))):
            name = text.replace("\\", "/").strip()
            if near is not None:
                beside = os.path.relpath(os.path.normpath(near / name), self.root)
                if Path(beside).as_posix() in self.names:
                    return Path(beside).as_posix()
            parts = [p for p in PurePosixPath(name).parts if p not in ("/", ".", "..")]
            for start in range(len(parts)):
                if "/".join(parts[start:]) in self.names:
                    return "/".join(parts[start:])
            if found := self._nearest(parts, near):
                return found
        return None

    def _nearest(self, parts: list[str], near: Path | None) -> str | None:
        """Return the one image of that name, else of that name with another ending."""
        if not parts:
            return None
        name = parts[-1].lower()
        stems = (name, name.rpartition(".")[0])
        for table, key in ((self._by_name, name), *((self._by_stem, s) for s in stems)):
            found = table.get(key, [])
            if len(found) > 1 and near is not None:
                # Of several images of one name, that in the folder of the annotation is meant.
                found = [f for f in found if (self.root / f).parent == near]
            if len(found) == 1:
                return found[0]
        return None


def image_files(root: Path) -> list[Path]:
    """Return all images below a folder, sorted; hidden files and folders are left out."""
    return sorted(
        path
        for path in root.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
        and path.is_file()
    )
