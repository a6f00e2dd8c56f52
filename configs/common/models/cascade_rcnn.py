"""Cascade Mask R-CNN: three box heads, each on the boxes of the one before.

Source: Cai and Vasconcelos 2018 (arXiv 1712.00726).
"""

from d2kit.config import LazyCall as L
from d2kit.layers import ShapeSpec
from d2kit.modeling.box_regression import Box2BoxTransform, Matcher
from d2kit.modeling.roi_heads import CascadeROIHeads, FastRCNNConvFCHead, FastRCNNOutputLayers

from .mask_rcnn_fpn import model

STAGES = ((0.5, 10, 5), (0.6, 20, 10), (0.7, 30, 15))  # IoU, weights of the centre and of the size

model.proposal_generator.post_nms_topk = (2000, 1000)
for name in ("box_head", "box_predictor", "proposal_matcher"):
    del model.roi_heads[name]
model.roi_heads.update(
    _target_=CascadeROIHeads,
    box_heads=[
        L(FastRCNNConvFCHead)(
            input_shape=ShapeSpec(channels=256, height=7, width=7),
            conv_dims=[],
            fc_dims=[1024, 1024],
        )
        for _ in STAGES
    ],
    box_predictors=[
        L(FastRCNNOutputLayers)(
            input_shape=ShapeSpec(channels=1024),
            test_score_thresh=0.05,
            box2box_transform=L(Box2BoxTransform)(weights=(centre, centre, size, size)),
            cls_agnostic_bbox_reg=True,
            num_classes="${...num_classes}",
        )
        for _, centre, size in STAGES
    ],
    proposal_matchers=[
        L(Matcher)(thresholds=[iou], labels=[0, 1], allow_low_quality_matches=False)
        for iou, _, _ in STAGES
    ],
)
