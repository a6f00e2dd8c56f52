"""Registry of whole models."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from fnmatch import fnmatchcase
from types import MethodType

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from d2kit.config import CfgNode
from d2kit.modeling.compiling import compile_trunk
from d2kit.utils.devices import choose_device
from d2kit.utils.registry import Registry, nearest_names

__all__ = ["META_ARCH_REGISTRY", "build_model"]


logger = logging.getLogger(__name__)


def freeze_by_pattern(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Freeze what the names of modules and parameters say, in place.

    Parameters no longer need gradients. BatchNorm layers in it, or with both of their parameters
    in it, stay in eval mode also when the model is put into train mode, so that their statistics
    stay as they are. Names of parameters and weights do not change.

    Args:
        model: any model.
        patterns: globs on full names, in which ``*`` also stands for dots: ``backbone`` is all of
            that module, ``*.bias`` all biases, ``roi_heads.box_*`` all modules that begin so.

    Returns:
        The names of the parameters that match.

    Raises:
        ValueError: if a pattern matches no name; the message lists the nearest names.
    """
    if isinstance(patterns, str):
        raise ValueError(f"MODEL.FREEZE: expected a list of patterns, got the text '{patterns}'")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules(remove_duplicate=False))
    names = [name for name in (*modules, *parameters) if name]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = ", ".join(nearest_names(pattern.replace("*", ""), names))
            raise ValueError(
                f"MODEL.FREEZE: '{pattern}' matches no module and no parameter of the model"
                + (f"; near: {near}" if near else "")
            )

    def chosen(name: str) -> bool:
        """Whether a pattern matches the name, or that of a module around it."""
        parts = name.split(".")
        around = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
        return any(fnmatchcase(each, pattern) for each in around for pattern in patterns)

    frozen = [name for name in parameters if chosen(name)]
    for name in frozen:
        parameters[name].requires_grad_(False)
    norms = 0
    for name, module in modules.items():
        if isinstance(module, _BatchNorm):
            own = [f"{name}.{last}" for last, _ in module.named_parameters(recurse=False)]
            if chosen(name) or (own and set(own) <= set(frozen)):
                module.train = MethodType(_stay_in_eval, module)  # type: ignore[method-assign]
                module.eval()
                norms += 1
    if patterns:
        count = sum(parameters[name].numel() for name in frozen)
        logger.info(
            "MODEL.FREEZE: %d of %d parameters (%.2f M numbers) are frozen, %d BatchNorm layers "
            "keep their statistics",
            len(frozen),
            len(parameters),
            count / 1e6,
            norms,
        )
    return frozen


def _stay_in_eval(module: nn.Module, mode: bool = True) -> nn.Module:
    """Take the place of `train` in a frozen BatchNorm layer."""
    module.training = False
    return module


META_ARCH_REGISTRY = Registry("META_ARCH")
"""Whole models: called with ``(cfg,)``.

The module maps a list of dicts, one per image, to a dict of losses in training mode and to a list
of result dicts in evaluation mode.
"""


def build_model(cfg: CfgNode) -> nn.Module:
    """Build the model that ``cfg.MODEL.META_ARCHITECTURE`` names, on ``cfg.MODEL.DEVICE``.

    No weights are loaded. A CUDA device on a machine without one is replaced by the CPU, with a
    warning. ``cfg.MODEL.COMPILE`` is obeyed, see `compile_trunk`.

    Args:
        cfg: the config.

    Returns:
        The model, in training mode.

    Raises:
        KeyError: if no such model is registered; the message lists the nearest names.
        ValueError: if a pattern of ``cfg.MODEL.FREEZE`` matches nothing, no part of the model uses
            ``cfg.MODEL.ROI_HEADS.CLASS_WEIGHTS``, which are set, or ``cfg.MODEL.COMPILE`` is none
            of its words.
    """
    model: nn.Module = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
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
    model = model.to(choose_device(cfg.MODEL.DEVICE))
    deterministic = bool(cfg.get("DETERMINISTIC", False))
    compile_trunk(model, cfg.MODEL.get("COMPILE"), deterministic=deterministic)
    return model
