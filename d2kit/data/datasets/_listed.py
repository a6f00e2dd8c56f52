"""Datasets that a config registers: DATASETS.REGISTER_COCO."""

import os
from collections.abc import Sequence
from typing import Any

from d2kit.data.catalog import DatasetCatalog
from d2kit.data.datasets._root import dataset_root
from d2kit.data.datasets.coco import CocoInstances, register_coco_instances

__all__ = ["register_datasets"]

KEY = "DATASETS.REGISTER_COCO"


def register_datasets(entries: Sequence[Sequence[str]]) -> None:
    """Register datasets in COCO format; nothing is read yet, and the same twice is no error.

    Args:
        entries: (name, annotation file, image folder) each, as in DATASETS.REGISTER_COCO. A
            relative path counts from the current folder or, if there is no such file, from the
            folder that D2KIT_DATASETS names.

    Raises:
        ValueError: an entry is of another form, holds a URL, or a name is taken by other files.
    """
    for entry in entries:
        name, json_file, image_root = _checked(entry)
        paths = _place(json_file), _place(image_root)
        if name not in DatasetCatalog:
            register_coco_instances(name, {}, *paths)
            continue
        known = DatasetCatalog[name]
        if not _is_of(known, *paths):
            now = "otherwise"
            if isinstance(known, CocoInstances):
                now = f"with '{known.json_file}' and '{known.image_root}'"
            raise ValueError(
                f"{KEY}: dataset '{name}' is already registered {now}, not with '{paths[0]}' and "
                f"'{paths[1]}'; choose another name"
            )


def _checked(entry: Any) -> tuple[str, str, str]:
    """Return an entry, or raise a ValueError that shows the form."""
    form = "[name, annotations.json, folder of images]"
    if not isinstance(entry, (list, tuple)) or len(entry) != 3:
        raise ValueError(f"{KEY}: expected a list of {form}, got the entry {entry!r}")
    if not all(isinstance(part, str) and part for part in entry):
        raise ValueError(f"{KEY}: expected three texts {form}, got {entry!r}")
    for path in entry[1:]:
        if "://" in path:
            raise ValueError(f"{KEY}: '{path}' is no local path; download it, and give its path")
    return entry[0], entry[1], entry[2]


def _place(path: str) -> str:
    """Return where a path of a config leads."""
    path = os.path.expanduser(path)
    below = os.path.join(dataset_root(), path)  # an absolute path stays itself
    return below if not os.path.exists(path) and os.path.exists(below) else path


def _is_of(known: Any, json_file: str, image_root: str) -> bool:
    if not isinstance(known, CocoInstances):
        return False
    pairs = ((known.json_file, json_file), (known.image_root, image_root))
    return all(os.path.realpath(a) == os.path.realpath(b) for a, b in pairs)
