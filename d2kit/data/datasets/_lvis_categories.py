"""The categories of LVIS, taken from its annotation files: 1203 of v1, 1230 of v0.5.

They are nowhere in this package. The first file found in ``lvis/`` below the folder of the public
datasets is read: the training set's, whose counts of images are those that losses weigh classes
by, else that of another split.
"""

from __future__ import annotations

import json
import mmap
import os
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, overload

from d2kit.data.datasets._root import dataset_root
from d2kit.data.datasets._validate import DatasetError, short

__all__ = ["LvisCategories", "image_counts", "read_categories"]

FIELDS = ("id", "name", "frequency", "image_count")
_WINDOWS = (2**22, 2**26)
"""Bytes to parse the list within; that of v1 has about half a million."""

_FILES = {
    "v0.5": ("train", "val", "image_info_test"),
    "v1": ("train", "val", "image_info_test_dev", "image_info_test_challenge"),
}


def find_file(version: str, root: str) -> str:
    """Return the annotation file to take the categories of a version from.

    Raises:
        FileNotFoundError: there is none.
    """
    folder = os.path.join(root, "lvis")
    names = [f"lvis_{version}_{split}.json" for split in _FILES[version]]
    for name in names:
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            return path
    raise FileNotFoundError(
        f"the categories of LVIS {version} are read from its annotations, but none of "
        f"{', '.join(names)} is in '{folder}'; download one from lvisdataset.org, or set "
        "D2KIT_DATASETS to the folder that has 'lvis/'"
    )


@lru_cache(maxsize=4)
def read_categories(path: str) -> tuple[dict[str, Any], ...]:
    """Return the categories of an annotation file, by id; the rest of the file is not parsed.

    Args:
        path: local file.

    Raises:
        DatasetError: it has no such list, or one without `FIELDS`.
    """
    categories = _scan(path)
    for entry in categories:
        missing = [f for f in FIELDS if not isinstance(entry, dict) or f not in entry]
        if missing:
            raise DatasetError(f"{path}: categories: no {', '.join(missing)} in {short(entry)}")
    return tuple(sorted(categories, key=lambda entry: entry["id"]))


def _scan(path: str) -> list[Any]:
    """Find the list in a file of up to some gigabytes, and parse it alone."""
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                match = re.search(rb'"categories"\s*:\s*(?=\[)', content)
                start = match.end() if match else len(content)
                for window in _WINDOWS:
                    text = content[start : start + window].decode("utf-8", "ignore")
                    try:
                        return json.JSONDecoder().raw_decode(text)[0]
                    except ValueError:
                        continue
    raise DatasetError(f"{path}: categories: no list of categories that can be read")


def image_counts(categories: Sequence[dict[str, Any]]) -> list[dict[str, int]]:
    """Return ``{"id", "image_count"}`` of each category."""
    return [{"id": c["id"], "image_count": c["image_count"]} for c in categories]


class LvisCategories(Sequence[dict[str, Any]]):
    """The categories of a version by id, read when they are first looked at.

    Args:
        version: "v0.5" or "v1".
        counts_only: ``{"id", "image_count"}`` in place of all fields.
    """

    def __init__(self, version: str, counts_only: bool = False) -> None:
        self.version = version
        self.counts_only = counts_only

    def _entries(self) -> list[dict[str, Any]]:
        entries = read_categories(find_file(self.version, dataset_root()))
        return image_counts(entries) if self.counts_only else list(entries)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        return self._entries()[index]

    def __len__(self) -> int:
        return len(self._entries())
