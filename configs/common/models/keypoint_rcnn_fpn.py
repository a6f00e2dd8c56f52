"""Keypoint R-CNN: one class, 17 keypoints (He et al. 2017, section 5)."""

from d2kit.config import LazyCall as L
from d2kit.layers import ShapeSpec
from d2kit.modeling.poolers import ROIPooler
from d2kit.modeling.roi_heads import KRCNNConvDeconvUpsampleHead

from .mask_rcnn_fpn import ROI_LEVELS, ROI_SCALES, model

for name in ("mask_in_features", "mask_pooler", "mask_head"):
    del model.roi_heads[name]
model.roi_heads.update(
    num_classes=1,
    keypoint_in_features=ROI_LEVELS,
    keypoint_pooler=L(ROIPooler)(
        output_size=14, scales=ROI_SCALES, sampling_ratio=0, pooler_type="ROIAlignV2"
    ),
    keypoint_head=L(KRCNNConvDeconvUpsampleHead)(
        input_shape=ShapeSpec(channels=256, width=14, height=14),
        num_keypoints=17,
        conv_dims=[512] * 8,
        loss_normalizer="visible",
    ),
)
# Boxes of one class are easier to find: more proposals, and a loss that is square near zero.
model.proposal_generator.post_nms_topk = (1500, 1000)
model.roi_heads.box_predictor.smooth_l1_beta = 0.5
