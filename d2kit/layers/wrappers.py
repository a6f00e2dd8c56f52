"""Thin additions to torch.nn, and the shape of a feature map known when a model is built."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2kit.layers.batch_norm import FrozenBatchNorm2d
from d2kit.utils.devices import upload
from d2kit.utils.registry import nearest_names

__all__ = [
    "BatchNorm2d",
    "Conv2d",
    "ConvTranspose2d",
    "Linear",
    "ShapeSpec",
    "cat",
    "cross_entropy",
    "empty_input_loss_func_wrapper",
    "interpolate",
    "move_device_like",
    "nonzero_tuple",
    "shapes_to_tensor",
]


@dataclass
class ShapeSpec:
    """What one module tells the next about its output.

    Args:
        channels: C; None where unknown.
        height: H in pixels; None where it depends on the image.
        width: W in pixels; None where it depends on the image.
        stride: pixels of the input image per pixel of the feature map.
    """

    channels: int | None = None
    height: int | None = None
    width: int | None = None
    stride: int | None = None


def shapes_of(names: Sequence[str], shapes: Mapping[str, ShapeSpec], key: str) -> list[ShapeSpec]:
    """Return the shapes of some of the backbone's levels.

    Args:
        names: of the levels.
        shapes: feature name -> its shape, as the backbone gives it.
        key: the config key that holds `names`, for the message.

    Raises:
        ValueError: if there is no such level.
    """
    unknown = [name for name in names if name not in shapes]
    if unknown:
        raise ValueError(
            f"{key} names {unknown}, which the backbone does not give; it "
            f"gives {sorted(shapes)} (nearest: {nearest_names(unknown[0], shapes)})"
        )
    return [shapes[name] for name in names]


def region_shape(shape: ShapeSpec, what: str) -> tuple[int, int, int]:
    """Return channels, height and width of one region's features; the sides default to 1.

    Args:
        shape: what a pooler or a head states.
        what: who asks, for the message.

    Raises:
        ValueError: if the channels are not known.
    """
    if shape.channels is None:
        raise ValueError(f"{what} needs the channels of its input, got {shape}")
    return shape.channels, shape.height or 1, shape.width or 1


# torch accepts empty batches in all of these today; the names stay for the code that imports them
BatchNorm2d = nn.BatchNorm2d
ConvTranspose2d = nn.ConvTranspose2d
Linear = nn.Linear
interpolate = F.interpolate


def shapes_to_tensor(x: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Return the integers `x` as an int64 tensor on `device`."""
    return torch.as_tensor([int(v) for v in x], dtype=torch.int64, device=device)


def cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Concatenate along `dim`; a single tensor is returned as it is, not copied."""
    if not isinstance(tensors, list | tuple):
        raise TypeError(f"cat: expected a list or tuple of tensors, got {type(tensors).__name__}")
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def empty_input_loss_func_wrapper(loss_func: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap `loss_func(input, target, *, reduction, **kwargs)` so that no input gives 0, not NaN."""

    @functools.wraps(loss_func)
    def mean_or_zero(
        input: Tensor, target: Tensor, *, reduction: str = "mean", **kwargs: Any
    ) -> Tensor:
        if reduction != "mean" or target.numel() > 0:
            return loss_func(input, target, reduction=reduction, **kwargs)
        nothing = input.sum()  # of no element: 0, but with a gradient, which DDP waits for
        return nothing * 0.0

    return mean_or_zero


cross_entropy = empty_input_loss_func_wrapper(F.cross_entropy)


def nonzero_tuple(x: Tensor) -> tuple[Tensor, ...]:
    """Return the indices of non-zero elements, one int64 tensor per axis; a scalar is 1-D."""
    return (x.unsqueeze(0) if x.dim() == 0 else x).nonzero(as_tuple=True)


def move_device_like(src: Tensor, dst: Tensor) -> Tensor:
    """Return `src` on the device of `dst`."""
    return upload(src, dst.device)


class _NewEmptyTensorOp(torch.autograd.Function):
    """An empty output of a given shape that lets gradients of an empty batch pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, new_shape: Sequence[int]) -> Tensor:  # type: ignore[override]
        ctx.input_size = x.size()
        return torch.empty(tuple(new_shape), dtype=x.dtype, device=x.device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return torch.zeros(ctx.input_size, dtype=grad.dtype, device=grad.device), None


class Conv2d(nn.Conv2d):
    """torch.nn.Conv2d followed by an optional norm and an optional activation.

    Args:
        *args: as of torch.nn.Conv2d.
        norm: a module applied to the convolution's output, or None.
        activation: a function or module applied last, or None.
        **kwargs: as of torch.nn.Conv2d.
    """

    def __init__(
        self,
        *args: Any,
        norm: nn.Module | None = None,
        activation: Callable[[Tensor], Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.norm = norm
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Apply convolution, norm and activation to `x` (N, C, H, W)."""
        norm = self.norm
        if type(norm) is FrozenBatchNorm2d and not (norm._forward_hooks or norm._forward_pre_hooks):
            # Scaling the weights costs nothing beside a pass over the output: 64 to 256 channels,
            # 1x1, 100x150 pixels, one thread: 9 ms instead of 24.
            scale, shift = norm.affine()
            if self.bias is not None:
                shift = shift + self.bias * scale
            x = self._conv_forward(x, self.weight * scale[:, None, None, None], shift)
        else:
            x = self._conv_forward(x, self.weight, self.bias)
            if norm is not None:
                x = norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x
