"""Heads for single points."""

from d2kit.modeling.roi_heads._point_head import (
    POINT_HEAD_REGISTRY,
    StandardPointHead,
    build_point_head,
    roi_mask_point_loss,
)

__all__ = ["POINT_HEAD_REGISTRY", "StandardPointHead", "build_point_head", "roi_mask_point_loss"]
