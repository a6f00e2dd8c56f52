"""Registry of whole models."""

from torch import nn

from d2kit.config import CfgNode
from d2kit.modeling.freezing import freeze_by_pattern
from d2kit.utils.devices import choose_device
from d2kit.utils.registry import Registry

__all__ = ["META_ARCH_REGISTRY", "build_model"]

META_ARCH_REGISTRY = Registry("META_ARCH")
"""Whole models: called with ``(cfg,)``.

The module maps a list of dicts, one per image, to a dict of losses in training mode and to a list
of result dicts in evaluation mode.
"""


def build_model(cfg: CfgNode) -> nn.Module:
    """Build the model that ``cfg.MODEL.META_ARCHITECTURE`` names, on ``cfg.MODEL.DEVICE``.

    No weights are loaded. A CUDA device on a machine without one is replaced by the CPU, with a
    warning.

    Args:
        cfg: the config.

    Returns:
        The model, in training mode.

    Raises:
        KeyError: if no such model is registered; the message lists the nearest names.
        ValueError: if a pattern of ``cfg.MODEL.FREEZE`` matches nothing, or no part of the model
            uses ``cfg.MODEL.ROI_HEADS.CLASS_WEIGHTS``, which are set.
    """
    model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
    freeze_by_pattern(model, cfg.MODEL.get("FREEZE", ()))
    if cfg.MODEL.ROI_HEADS.get("CLASS_WEIGHTS") and all(
        getattr(module, "class_weights", None) is None for module in model.modules()
    ):
        raise ValueError(
            f"MODEL.ROI_HEADS.CLASS_WEIGHTS is set, but nothing in {type(model).__name__} uses it: "
            "only the box heads of R-CNN models do (FastRCNNOutputLayers). Leave it at None; "
            "RetinaNet and FCOS balance by MODEL.RETINANET.FOCAL_LOSS_ALPHA / GAMMA and "
            "MODEL.FCOS.FOCAL_LOSS_ALPHA / GAMMA, any model by DATALOADER.SAMPLER_TRAIN "
            "RepeatFactorTrainingSampler"
        )
    return model.to(choose_device(cfg.MODEL.DEVICE))
