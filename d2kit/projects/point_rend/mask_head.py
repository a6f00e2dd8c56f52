"""PointRend's mask heads."""

from d2kit.modeling.roi_heads.implicit_point_rend import ImplicitPointRendMaskHead
from d2kit.modeling.roi_heads.point_rend import PointRendMaskHead

__all__ = ["ImplicitPointRendMaskHead", "PointRendMaskHead"]
