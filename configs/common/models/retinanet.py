"""RetinaNet with a ResNet-50 (Lin et al. 2017, arXiv 1708.02002)."""

from d2kit.config import LazyCall as L
from d2kit.layers import ShapeSpec
from d2kit.modeling.anchor_generator import DefaultAnchorGenerator
from d2kit.modeling.backbone.fpn import LastLevelP6P7
from d2kit.modeling.box_regression import Box2BoxTransform, Matcher
from d2kit.modeling.meta_arch import RetinaNet
from d2kit.modeling.meta_arch.retinanet import RetinaNetHead

from ..data.constants import constants
from .mask_rcnn_fpn import model as _mask_rcnn

LEVELS = ["p3", "p4", "p5", "p6", "p7"]

_mask_rcnn.backbone.bottom_up.out_features = ["res3", "res4", "res5"]
_mask_rcnn.backbone.top_block = L(LastLevelP6P7)(in_channels=2048, out_channels=256)
model = L(RetinaNet)(
    backbone=_mask_rcnn.backbone,
    head=L(RetinaNetHead)(
        input_shape=[ShapeSpec(channels=256)] * len(LEVELS),
        num_classes="${..num_classes}",
        conv_dims=[256, 256, 256, 256],
        prior_prob=0.01,
        num_anchors=9,
    ),
    anchor_generator=L(DefaultAnchorGenerator)(
        sizes=[[x, x * 2 ** (1 / 3), x * 2 ** (2 / 3)] for x in (32, 64, 128, 256, 512)],
        aspect_ratios=[0.5, 1.0, 2.0],
        strides=[8, 16, 32, 64, 128],
        offset=0.0,
    ),
    box2box_transform=L(Box2BoxTransform)(weights=(1.0, 1.0, 1.0, 1.0)),
    anchor_matcher=L(Matcher)(
        thresholds=[0.4, 0.5], labels=[0, -1, 1], allow_low_quality_matches=True
    ),
    num_classes=80,
    head_in_features=LEVELS,
    focal_loss_alpha=0.25,
    focal_loss_gamma=2.0,
    smooth_l1_beta=0.0,
    pixel_mean=constants.imagenet_bgr256_mean,
    pixel_std=constants.imagenet_bgr256_std,
    input_format="BGR",
)
