"""The 1230 categories of LVIS v0.5, by id (see `lvis.shipped_categories`)."""

from typing import Any

from d2kit.data.datasets.lvis import shipped_categories

__all__ = ["LVIS_CATEGORIES"]

LVIS_CATEGORIES: list[dict[str, Any]] = list(shipped_categories("v0.5"))
