"""The 1203 categories of LVIS v1 and their training images, by id."""

from __future__ import annotations

from typing import Any

from d2kit.data.datasets.lvis import image_counts, shipped_categories

__all__ = [
    "LVIS_CATEGORIES",
    "LVIS_CATEGORY_IMAGE_COUNT",
]


LVIS_CATEGORIES: list[dict[str, Any]] = list(shipped_categories("v1"))


LVIS_CATEGORY_IMAGE_COUNT: list[dict[str, Any]] = image_counts(shipped_categories("v1"))
