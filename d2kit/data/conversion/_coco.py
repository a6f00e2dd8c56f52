"""COCO JSON, checked as it is read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from d2kit.data.datasets._validate import Problems, check_coco, path_problem, read_json
from d2kit.utils.file_io import atomic_write


def read_coco_dataset(
    path: Path, images: Path | None = None, lost: Counter[str] | None = None
) -> dict[str, Any]:
    """Read a COCO JSON file.

    Args:
        path: the file.
        images: not used.
        lost: not used, COCO holds everything.

    Raises:
        DatasetError: one line for each defect; `tools/check_data.py --fix` repairs them.
    """
    data = read_json(str(path), str(path))
    problems = Problems(str(path))
    tables = check_coco(data, problems, problems, Problems(str(path)))
    for number, image in tables.images.items():
        what = path_problem(image.get("file_name"), ".")
        if what:
            problems.add(f"image {number}", "file_name", what)
    problems.raise_if_any()
    categories = list(tables.categories.values())
    extra = {k: v for k, v in data.items() if k in ("info", "licenses", "videos")}
    parts = {"images": list(tables.images.values()), "annotations": tables.annotations}
    return {**extra, **parts, "categories": categories}


def write_coco_dataset(coco: Mapping[str, Any], path: Path) -> Counter[str]:
    """Write a COCO JSON file, which holds everything."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "w") as file:
        json.dump(coco, file, allow_nan=False)
    return Counter()
