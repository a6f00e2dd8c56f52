"""Training images per category of LVIS v1, by id (see `_lvis_categories`)."""

from typing import Any

from d2kit.data.datasets.lvis import image_counts, shipped_categories

__all__ = ["LVIS_CATEGORY_IMAGE_COUNT"]

LVIS_CATEGORY_IMAGE_COUNT: list[dict[str, Any]] = image_counts(shipped_categories("v1"))
