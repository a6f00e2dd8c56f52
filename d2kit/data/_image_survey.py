"""Reads all image files of a dataset once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from d2kit.data._image_io import _open_image, _read_bytes, read_image
from d2kit.data.datasets._validate import path_problem

__all__ = ["ImageFile", "survey_images"]


class ImageFile(NamedTuple):
    """What an image file holds.

    Args:
        path: of the file.
        width: in pixels, upright; 0 where it cannot be read.
        height: in pixels.
        problem: why it cannot be read; empty where it can.
        note: what is unusual about it.
    """

    path: str
    width: int = 0
    height: int = 0
    problem: str = ""
    note: str = ""


def survey_images(
    images: Iterable[Mapping[str, Any]],
    folder: str | os.PathLike[str],
    progress: Callable[[], Any] | None = None,
) -> dict[str, ImageFile]:
    """Decode the images of a dataset.

    Args:
        images: entries with `file_name`; those outside of the folder are not touched.
        folder: that the names are relative to.
        progress: called after each image.

    Returns:
        `file_name` -> what its file holds.
    """
    root = os.fspath(folder)
    names = {i.get("file_name") for i in images if isinstance(i, Mapping)}
    safe = [n for n in names if isinstance(n, str) and path_problem(n, root) is None]

    def look(name: str) -> ImageFile:
        found = _look(os.path.join(root, name))
        if progress:
            progress()
        return found

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(safe, pool.map(look, safe), strict=True))


def _look(path: str) -> ImageFile:
    if not os.path.isfile(path):
        return ImageFile(path, problem=f"{path}: image file does not exist")
    try:
        header = _open_image(_read_bytes(path), path)
        height, width = read_image(path, "RGB").shape[:2]
    except (ValueError, OSError) as error:  # both name the path
        text = str(error)
        return ImageFile(path, problem=text if path in text else f"{path}: {text}")
    return ImageFile(path, width, height, note=_unusual(header, (width, height)))


def _unusual(header: Any, size: tuple[int, int]) -> str:
    """Say what reading changes."""
    parts = []
    if getattr(header, "n_frames", 1) > 1:
        parts.append(f"animation of {header.n_frames} frames, the first is used")
    if header.size != size:
        parts.append("turned upright by its EXIF orientation")
    if header.mode not in ("RGB", "L", "P", "1"):
        parts.append(f"mode {header.mode} is converted to 8-bit RGB")
    return "; ".join(parts)
