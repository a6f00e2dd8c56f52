"""Networks that turn an image batch into feature maps."""

from d2kit.modeling.backbone.backbone import BACKBONE_REGISTRY, Backbone, build_backbone
from d2kit.modeling.backbone.builders import (
    TimmBackbone,
    build_mvit_fpn_backbone,
    build_regnet_fpn_backbone,
    build_swin_fpn_backbone,
    build_timm_fpn_backbone,
    build_vit_sfp_backbone,
)
from d2kit.modeling.backbone.fpn import (
    FPN,
    LastLevelMaxPool,
    LastLevelP6P7,
    build_resnet_fpn_backbone,
    build_retinanet_resnet_fpn_backbone,
)
from d2kit.modeling.backbone.mvit import MViT
from d2kit.modeling.backbone.regnet import RegNet
from d2kit.modeling.backbone.resnet import (
    BasicBlock,
    BasicStem,
    BottleneckBlock,
    DeformBottleneckBlock,
    ResNet,
    ResNetBlockBase,
    build_resnet_backbone,
    make_stage,
)
from d2kit.modeling.backbone.swin import SwinTransformer
from d2kit.modeling.backbone.vit import SimpleFeaturePyramid, ViT, get_vit_lr_decay_rate

__all__ = [
    "BACKBONE_REGISTRY",
    "FPN",
    "Backbone",
    "BasicBlock",
    "BasicStem",
    "BottleneckBlock",
    "DeformBottleneckBlock",
    "LastLevelMaxPool",
    "LastLevelP6P7",
    "MViT",
    "RegNet",
    "ResNet",
    "ResNetBlockBase",
    "SimpleFeaturePyramid",
    "SwinTransformer",
    "TimmBackbone",
    "ViT",
    "build_backbone",
    "build_mvit_fpn_backbone",
    "build_regnet_fpn_backbone",
    "build_resnet_backbone",
    "build_resnet_fpn_backbone",
    "build_retinanet_resnet_fpn_backbone",
    "build_swin_fpn_backbone",
    "build_timm_fpn_backbone",
    "build_vit_sfp_backbone",
    "get_vit_lr_decay_rate",
    "make_stage",
]
