"""Models and their parts: backbones, proposals, per-region heads, whole detectors."""

import importlib
from typing import Any

from d2kit.layers import ShapeSpec
from d2kit.modeling.anchor_generator import ANCHOR_GENERATOR_REGISTRY, build_anchor_generator
from d2kit.modeling.backbone import (
    BACKBONE_REGISTRY,
    FPN,
    Backbone,
    MViT,
    RegNet,
    ResNet,
    ResNetBlockBase,
    SimpleFeaturePyramid,
    SwinTransformer,
    ViT,
    build_backbone,
    build_resnet_backbone,
    get_vit_lr_decay_rate,
    make_stage,
)
from d2kit.modeling.meta_arch import (
    FCOS,
    META_ARCH_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
    DenseDetector,
    GeneralizedRCNN,
    PanopticFPN,
    ProposalNetwork,
    RetinaNet,
    SemanticSegmentor,
    build_model,
    build_sem_seg_head,
    computing_in,
    optimize_for_inference,
)
from d2kit.modeling.postprocessing import detector_postprocess
from d2kit.modeling.proposal_generator import (
    PROPOSAL_GENERATOR_REGISTRY,
    RPN_HEAD_REGISTRY,
    build_proposal_generator,
    build_rpn_head,
)
from d2kit.modeling.roi_heads import (
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_KEYPOINT_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    BaseKeypointRCNNHead,
    BaseMaskRCNNHead,
    FastRCNNOutputLayers,
    ROIHeads,
    StandardROIHeads,
    build_box_head,
    build_keypoint_head,
    build_mask_head,
    build_roi_heads,
)

__all__ = [
    "ANCHOR_GENERATOR_REGISTRY",
    "BACKBONE_REGISTRY",
    "FCOS",
    "FPN",
    "META_ARCH_REGISTRY",
    "MViT",
    "PROPOSAL_GENERATOR_REGISTRY",
    "ROI_BOX_HEAD_REGISTRY",
    "ROI_HEADS_REGISTRY",
    "ROI_KEYPOINT_HEAD_REGISTRY",
    "ROI_MASK_HEAD_REGISTRY",
    "RPN_HEAD_REGISTRY",
    "SEM_SEG_HEADS_REGISTRY",
    "Backbone",
    "BaseKeypointRCNNHead",
    "BaseMaskRCNNHead",
    "FastRCNNOutputLayers",
    "DenseDetector",
    "GeneralizedRCNN",
    "PanopticFPN",
    "ProposalNetwork",
    "ROIHeads",
    "RegNet",
    "ResNet",
    "ResNetBlockBase",
    "RetinaNet",
    "SemanticSegmentor",
    "ShapeSpec",
    "SimpleFeaturePyramid",
    "StandardROIHeads",
    "SwinTransformer",
    "ViT",
    "build_anchor_generator",
    "build_backbone",
    "build_box_head",
    "build_keypoint_head",
    "build_mask_head",
    "build_model",
    "build_proposal_generator",
    "build_resnet_backbone",
    "build_roi_heads",
    "build_rpn_head",
    "build_sem_seg_head",
    "computing_in",
    "detector_postprocess",
    "get_vit_lr_decay_rate",
    "make_stage",
    "optimize_for_inference",
]

_ABOVE_MODELS = ("DatasetMapperTTA", "GeneralizedRCNNWithTTA")


def __getattr__(name: str) -> Any:
    """Load test-time augmentation, which needs the data too, only when it is asked for here."""
    if name in _ABOVE_MODELS:
        return getattr(importlib.import_module("d2kit.evaluation.test_time_augmentation"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
