"""Whole models."""

from d2kit.modeling.meta_arch._optimize import optimize_for_inference
from d2kit.modeling.meta_arch.build import META_ARCH_REGISTRY, build_model
from d2kit.modeling.meta_arch.rcnn import GeneralizedRCNN, ProposalNetwork

__all__ = [
    "META_ARCH_REGISTRY",
    "GeneralizedRCNN",
    "ProposalNetwork",
    "build_model",
    "optimize_for_inference",
]
