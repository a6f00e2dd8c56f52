"""The 1203 categories of LVIS v1, from its annotation file (see `_lvis_categories`)."""

from d2kit.data.datasets.lvis import LvisCategories

__all__ = ["LVIS_CATEGORIES"]

LVIS_CATEGORIES = LvisCategories("v1")
