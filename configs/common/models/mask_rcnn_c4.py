"""Mask R-CNN on the res4 features of a ResNet-50, with res5 as its head: He et al. 2017."""

from d2kit.config import LazyCall as L
from d2kit.layers import ShapeSpec
from d2kit.modeling.backbone import BottleneckBlock, ResNet
from d2kit.modeling.box_regression import Box2BoxTransform
from d2kit.modeling.poolers import ROIPooler
from d2kit.modeling.roi_heads import FastRCNNOutputLayers, MaskRCNNConvUpsampleHead, Res5ROIHeads

from .mask_rcnn_fpn import model

model.backbone = model.backbone.bottom_up
model.backbone.out_features = ["res4"]

model.proposal_generator.in_features = ["res4"]
model.proposal_generator.head.update(in_channels=1024, num_anchors=15)
model.proposal_generator.anchor_generator.update(sizes=[[32, 64, 128, 256, 512]], strides=[16])
model.proposal_generator.update(pre_nms_topk=(12000, 6000), post_nms_topk=(2000, 1000))

_kept = ("num_classes", "batch_size_per_image", "positive_fraction", "proposal_matcher")
model.roi_heads = L(Res5ROIHeads)(
    **{name: model.roi_heads[name] for name in _kept},
    in_features=["res4"],
    pooler=L(ROIPooler)(
        output_size=14, scales=(1 / 16,), sampling_ratio=0, pooler_type="ROIAlignV2"
    ),
    res5=L(ResNet.make_stage)(
        block_class=BottleneckBlock,
        num_blocks=3,
        stride_per_block=[2, 1, 1],
        in_channels=1024,
        bottleneck_channels=512,
        out_channels=2048,
        norm="FrozenBN",
        stride_in_1x1=True,
    ),
    box_predictor=L(FastRCNNOutputLayers)(
        input_shape=ShapeSpec(channels=2048),
        test_score_thresh=0.05,
        box2box_transform=L(Box2BoxTransform)(weights=(10.0, 10.0, 5.0, 5.0)),
        num_classes="${..num_classes}",
    ),
    mask_head=L(MaskRCNNConvUpsampleHead)(
        input_shape=ShapeSpec(channels=2048, width=7, height=7),
        num_classes="${..num_classes}",
        conv_dims=[256],
    ),
)
