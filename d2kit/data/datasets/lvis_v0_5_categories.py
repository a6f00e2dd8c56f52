"""The 1230 categories of LVIS v0.5, from its annotation file (see `_lvis_categories`)."""

from d2kit.data.datasets.lvis import LvisCategories

__all__ = ["LVIS_CATEGORIES"]

LVIS_CATEGORIES = LvisCategories("v0.5")
