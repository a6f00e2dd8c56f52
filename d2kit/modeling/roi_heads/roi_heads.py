"""Per-region heads: registry, base class, and the two kinds that Detectron2's zoo uses.

Source: Fast R-CNN (Girshick 2015), Mask R-CNN (He et al. 2017).
"""

from d2kit.modeling.roi_heads._base import ROI_HEADS_REGISTRY, ROIHeads, build_roi_heads
from d2kit.modeling.roi_heads._res5 import Res5ROIHeads
from d2kit.modeling.roi_heads._selection import (
    select_foreground_proposals,
    select_proposals_with_visible_keypoints,
)
from d2kit.modeling.roi_heads._standard import StandardROIHeads

__all__ = [
    "ROI_HEADS_REGISTRY",
    "ROIHeads",
    "Res5ROIHeads",
    "StandardROIHeads",
    "build_roi_heads",
    "select_foreground_proposals",
    "select_proposals_with_visible_keypoints",
]
