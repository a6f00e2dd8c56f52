"""A folder of pictures per class, as image classification has them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from d2kit.curate.conversion.common import CocoBuilder
from d2kit.curate.conversion.foreign import SPLITS, image_files
from d2kit.curate.findings import survey_images


def read_folders(
    path: Path, images: Path | None = None, lost: Counter[str] | None = None
) -> dict[str, Any]:
    """Read ``cat/1.jpg`` and ``train/cat/1.jpg``: each image is one object as large as itself.

    Such data say what is on a picture and not where: a detector of it finds what fills the picture.

    Args:
        path: the folder.
        images: folder that names are relative to, by default `path`.
        lost: counts the objects that are whole images.
    """
    root = images or path
    builder = CocoBuilder(path, None, lost)
    files = [f for f in image_files(path) if f.parent.parent == path or f.parent != path]
    files = [f for f in files if f.parent != path and f.parent.name.lower() not in SPLITS]
    names = {f.relative_to(root).as_posix(): f.parent.name for f in files}
    sizes = survey_images([{"file_name": name} for name in names], root)
    for name, label in names.items():
        if sizes[name].problem:
            builder.lost["images that cannot be read (left out)"] += 1
            continue
        width, height = sizes[name].width, sizes[name].height
        image_id = builder.image(name, width, height)
        builder.add(image_id, label, [0, 0, width, height])
        builder.lost["places of objects (each box is its whole image)"] += 1
    return builder.finish()
