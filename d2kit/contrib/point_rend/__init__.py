"""PointRend (Kirillov et al. 2020): masks refined at the points where they are uncertain.

    cfg = get_cfg()
    add_pointrend_config(cfg)
    cfg.merge_from_file("pointrend.yaml")

where the file has, beside those of a Mask R-CNN with FPN, the keys

    MODEL:
      ROI_BOX_HEAD: {TRAIN_ON_PRED_BOXES: True}
      ROI_MASK_HEAD:
        NAME: PointRendMaskHead
        POOLER_TYPE: ""  # the head samples the features by itself
        IN_FEATURES: [p2]
        POINT_HEAD_ON: True
      POINT_HEAD: {IN_FEATURES: [p2], NUM_CLASSES: 80}
    INPUT: {MASK_FORMAT: bitmask}
"""

from d2kit.contrib.point_rend.mask_head import ImplicitPointRendMaskHead, PointRendMaskHead
from d2kit.contrib.point_rend.point_head import (
    StandardPointHead,
    add_pointrend_config,
    build_point_head,
)
from d2kit.data.transforms import ColorAugSSDTransform

__all__ = [
    "ColorAugSSDTransform",
    "ImplicitPointRendMaskHead",
    "PointRendMaskHead",
    "StandardPointHead",
    "add_pointrend_config",
    "build_point_head",
]
