"""PointRend's mask head."""

from d2kit.modeling.roi_heads.point_rend import PointRendMaskHead

__all__ = ["PointRendMaskHead"]
