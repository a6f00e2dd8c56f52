"""PointRend (Kirillov et al. 2020): masks refined at the points where they are uncertain."""

from d2kit.projects.point_rend.color_augmentation import ColorAugSSDTransform
from d2kit.projects.point_rend.config import add_pointrend_config
from d2kit.projects.point_rend.mask_head import PointRendMaskHead
from d2kit.projects.point_rend.point_head import StandardPointHead, build_point_head

__all__ = [
    "ColorAugSSDTransform",
    "PointRendMaskHead",
    "StandardPointHead",
    "add_pointrend_config",
    "build_point_head",
]
