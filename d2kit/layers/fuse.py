"""Folding of batch norms into convolutions for inference."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from d2kit.layers.batch_norm import FrozenBatchNorm2d
from d2kit.layers.deform_conv import DeformConv, ModulatedDeformConv
from d2kit.layers.wrappers import Conv2d
from d2kit.utils.devices import exact_dtype

__all__ = ["fold_batch_norm"]

_CONVOLUTIONS = (Conv2d, DeformConv, ModulatedDeformConv)


def fold_batch_norm(module: nn.Module) -> nn.Module:
    """Return a copy for inference with batch norms folded into the convolutions before them.

    Every d2kit convolution whose `norm` is a FrozenBatchNorm2d, or a batch norm in evaluation mode
    with running statistics, gets new weights and a bias, and loses the norm. Outputs agree to 1e-5.

    Args:
        module: any model; it is not changed.

    Returns:
        The copy, in the same mode and on the same device. Its state dict has other names, so load
        weights before folding.
    """
    folded = copy.deepcopy(module)
    for part in folded.modules():
        if not isinstance(part, _CONVOLUTIONS):
            continue
        affine = _affine(part.norm)
        if affine is not None:
            scale, shift = affine
            bias = 0.0 if part.bias is None else part.bias.detach().to(scale.dtype)
            weight = part.weight.detach().to(scale.dtype) * scale[:, None, None, None]
            part.weight = _like(part.weight, weight)
            part.bias = _like(part.weight, bias * scale + shift)
            part.norm = None
    return folded


def _affine(norm: Any) -> tuple[Tensor, Tensor] | None:
    """Return scale and shift of a norm that is a fixed affine map, else None.

    Both are (C,), of `exact_dtype`.
    """
    frozen = isinstance(norm, FrozenBatchNorm2d)
    if not frozen and not isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm):
        return None
    if not frozen and (norm.training or norm.running_mean is None):
        return None
    dtype = exact_dtype(norm.running_mean.device)
    mean, var = norm.running_mean.to(dtype), norm.running_var.to(dtype)
    scale = torch.rsqrt(var + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.detach().to(dtype)
    shift = -mean * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().to(dtype)
    return scale, shift


def _like(old: Tensor, new: Tensor) -> nn.Parameter:
    """Return `new` as a parameter of the dtype and, where it has four axes, the layout of `old`."""
    value = new.to(old.dtype)
    if value.dim() == 4 and old.is_contiguous(memory_format=torch.channels_last):
        value = value.contiguous(memory_format=torch.channels_last)
    return nn.Parameter(value, requires_grad=False)
