"""Training images per category of LVIS v1, from its annotation file (see `_lvis_categories`)."""

from d2kit.data.datasets.lvis import LvisCategories

__all__ = ["LVIS_CATEGORY_IMAGE_COUNT"]

LVIS_CATEGORY_IMAGE_COUNT = LvisCategories("v1", counts_only=True)
