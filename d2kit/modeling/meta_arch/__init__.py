"""Whole models."""

from d2kit.modeling.meta_arch.build import META_ARCH_REGISTRY, build_model
from d2kit.modeling.meta_arch.common import computing_in, optimize_for_inference
from d2kit.modeling.meta_arch.dense_detector import DenseDetector
from d2kit.modeling.meta_arch.fcos import FCOS
from d2kit.modeling.meta_arch.panoptic_fpn import (
    SEM_SEG_HEADS_REGISTRY,
    PanopticFPN,
    SemanticSegmentor,
    build_sem_seg_head,
)
from d2kit.modeling.meta_arch.rcnn import GeneralizedRCNN, ProposalNetwork
from d2kit.modeling.meta_arch.retinanet import RetinaNet

__all__ = [
    "FCOS",
    "META_ARCH_REGISTRY",
    "SEM_SEG_HEADS_REGISTRY",
    "DenseDetector",
    "GeneralizedRCNN",
    "PanopticFPN",
    "ProposalNetwork",
    "RetinaNet",
    "SemanticSegmentor",
    "build_model",
    "build_sem_seg_head",
    "computing_in",
    "optimize_for_inference",
]
