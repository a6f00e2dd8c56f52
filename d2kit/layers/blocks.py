"""Blocks of convolutional networks: deformable, separable, ASPP; weight fills, folded norms."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.utils import _pair
from torchvision.ops import deform_conv2d

from d2kit.layers.batch_norm import FrozenBatchNorm2d, get_norm
from d2kit.layers.wrappers import Conv2d
from d2kit.utils.devices import exact_dtype

__all__ = [
    "ASPP",
    "CNNBlockBase",
    "DeformConv",
    "DepthwiseSeparableConv2d",
    "ModulatedDeformConv",
    "fold_batch_norm",
]


class _DeformableConv(nn.Module):
    """What both versions share."""

    _with_bias = True  # whether a learnt bias is supported

    not_deterministic_on_cuda = "torchvision::deform_conv2d (backward)"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        deformable_groups: int = 1,
        bias: bool = False,
        norm: nn.Module | None = None,
        activation: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if bias and not self._with_bias:
            raise ValueError(f"{name}: bias=True is not supported; use a norm with a bias")
        if in_channels % groups or out_channels % groups or in_channels % deformable_groups:
            raise ValueError(
                f"{name}: groups={groups} must divide in_channels={in_channels} and "
                f"out_channels={out_channels}, and deformable_groups={deformable_groups} must "
                "divide in_channels"
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = _pair(kernel_size)
        self.stride = _pair(stride)
        self.padding = _pair(padding)
        self.dilation = _pair(dilation)
        self.groups = groups
        self.deformable_groups = deformable_groups
        self.norm = norm
        self.activation = activation
        self.weight = nn.Parameter(
            torch.empty(out_channels, in_channels // groups, *self.kernel_size)
        )
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")

    def _apply_conv(self, x: Tensor, offset: Tensor, mask: Tensor | None) -> Tensor:
        x = deform_conv2d(
            x, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask
        )
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x

    def extra_repr(self) -> str:
        """List the settings."""
        return (
            f"in_channels={self.in_channels}, out_channels={self.out_channels}, "
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"dilation={self.dilation}, groups={self.groups}, "
            f"deformable_groups={self.deformable_groups}, bias={self.bias is not None}"
        )


class DeformConv(_DeformableConv):
    """A convolution whose taps are moved by learnt offsets.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: in pixels.
        stride: in pixels.
        padding: in pixels.
        dilation: in pixels.
        groups: groups of channels of the convolution.
        deformable_groups: groups of channels that share offsets.
        bias: not supported, kept for the signature.
        norm: a module applied to the output, or None.
        activation: a function applied last, or None.

    Source: Dai et al., Deformable Convolutional Networks (2017).
    """

    _with_bias = False

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:
        """Convolve.

        Args:
            x: (N, C, H, W).
            offset: (N, 2 * deformable_groups * kernel height * kernel width, H', W') in pixels,
                y before x for each tap.

        Returns:
            (N, out_channels, H', W').
        """
        return self._apply_conv(x, offset, None)


class ModulatedDeformConv(_DeformableConv):
    """A deformable convolution whose taps are also weighted per position.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: in pixels.
        stride: in pixels.
        padding: in pixels.
        dilation: in pixels.
        groups: groups of channels of the convolution.
        deformable_groups: groups of channels that share offsets and weights of taps.
        bias: whether to add a learnt bias.
        norm: a module applied to the output, or None.
        activation: a function applied last, or None.

    Source: Zhu et al., Deformable ConvNets v2 (2019).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        deformable_groups: int = 1,
        bias: bool = True,
        norm: nn.Module | None = None,
        activation: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            deformable_groups,
            bias,
            norm,
            activation,
        )

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        """Convolve.

        Args:
            x: (N, C, H, W).
            offset: (N, 2 * deformable_groups * kernel height * kernel width, H', W') in pixels,
                y before x for each tap.
            mask: (N, deformable_groups * kernel height * kernel width, H', W'), weights of taps.

        Returns:
            (N, out_channels, H', W').
        """
        return self._apply_conv(x, offset, mask)


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


class _HasWeight(Protocol):
    """A convolution (plain, transposed, deformable) or linear layer."""

    weight: Any

    @property
    def bias(self) -> Tensor | None: ...


def msra_fill(module: _HasWeight) -> None:
    """Draw the weight of `module` from a normal of variance 2 / fan-out and zero its bias.

    Args:
        module: a layer with `weight` and, optionally, `bias`; changed in place.

    Source: He et al., Delving Deep into Rectifiers (2015), section 2.2, backward case.
    """
    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def xavier_fill(module: _HasWeight) -> None:
    """Draw the weight of `module` from a uniform of variance 1 / fan-in and zero its bias.

    Args:
        module: a layer with `weight` and, optionally, `bias`; changed in place.

    Source: Glorot and Bengio (2010), with the fan-in alone, as Caffe2 does.
    """
    nn.init.kaiming_uniform_(module.weight, a=1)
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def normal_fill(module: _HasWeight, std: float, bias: float = 0.0) -> None:
    """Draw the weight of `module` from a normal around 0 and set its bias, as predictors start.

    Args:
        module: a layer with `weight` and, optionally, `bias`; changed in place.
        std: standard deviation of the weights.
        bias: value of each bias.
    """
    nn.init.normal_(module.weight, std=std)
    if module.bias is not None:
        nn.init.constant_(module.bias, bias)


class CNNBlockBase(nn.Module):
    """A block from (N, in_channels, H, W) to (N, out_channels, ceil(H/stride), ceil(W/stride)).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: pixels of the input per pixel of the output.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.stride = stride

    def freeze(self) -> CNNBlockBase:
        """Stop training of all parameters and make batch norms frozen; return the block."""
        FrozenBatchNorm2d.convert_frozen_batchnorm(self.requires_grad_(False))
        return self


class DepthwiseSeparableConv2d(nn.Module):
    """A depthwise convolution and a 1x1 convolution (Chollet, Xception, 2017, section 3).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: of the depthwise convolution, in pixels.
        padding: of the depthwise convolution, in pixels.
        dilation: of the depthwise convolution, in pixels.
        norm1: norm after the depthwise convolution, as of `get_norm`.
        activation1: activation after the depthwise convolution.
        norm2: norm after the 1x1 convolution.
        activation2: activation after the 1x1 convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        padding: int = 1,
        dilation: int = 1,
        *,
        norm1: str | Callable[[int], nn.Module] | None = None,
        activation1: Callable[[Tensor], Tensor] | None = None,
        norm2: str | Callable[[int], nn.Module] | None = None,
        activation2: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()

        def convolution(channels: int, norm: Any, activation: Any, **shape: Any) -> Conv2d:
            after = {"norm": get_norm(norm, channels), "activation": activation}
            # a norm has a bias of its own
            made = Conv2d(in_channels, channels, bias=not norm, **shape, **after)
            msra_fill(made)
            return made

        area = {"kernel_size": kernel_size, "padding": padding, "dilation": dilation}
        # as many groups as channels: one filter for each
        self.depthwise = convolution(in_channels, norm1, activation1, groups=in_channels, **area)
        self.pointwise = convolution(out_channels, norm2, activation2, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply both convolutions to `x` (N, C, H, W)."""
        found: Tensor = self.pointwise(self.depthwise(x))
        return found


Norm = str | Callable[[int], nn.Module]


class ASPP(nn.Module):
    """A 1x1 and three dilated 3x3 convolutions beside a pooled branch, joined by a 1x1 one.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        dilations: three dilations of the 3x3 convolutions, in pixels.
        norm: norm of the convolutions, as of `get_norm`.
        activation: activation of the convolutions.
        pool_kernel_size: (height, width) in pixels of the average pooling; None pools all.
        dropout: probability of zeroing an output in training.
        use_depthwise_separable_conv: whether the 3x3 convolutions are depthwise separable.

    Raises:
        ValueError: if there are not three dilations.

    Source: Chen et al., Rethinking Atrous Convolution (2017), section 3.3.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        dilations: Sequence[int],
        *,
        norm: Norm,
        activation: Callable[[Tensor], Tensor],
        pool_kernel_size: tuple[int, int] | None = None,
        dropout: float = 0.0,
        use_depthwise_separable_conv: bool = False,
    ) -> None:
        super().__init__()
        if len(dilations) != 3:
            raise ValueError(f"ASPP: expected three dilations, got {list(dilations)}")
        self.pool_kernel_size = pool_kernel_size
        self.dropout = dropout

        def conv(channels: int, size: int, dilation: int, use_norm: bool = True) -> Conv2d:
            made = Conv2d(
                channels,
                out_channels,
                kernel_size=size,
                padding=dilation * (size // 2),
                dilation=dilation,
                bias=not (norm and use_norm),
                norm=get_norm(norm, out_channels) if use_norm else None,
                activation=copy.deepcopy(activation),
            )
            xavier_fill(made)
            return made

        self.convs = nn.ModuleList([conv(in_channels, 1, 1)])
        for dilation in dilations:
            self.convs.append(
                DepthwiseSeparableConv2d(
                    in_channels,
                    out_channels,
                    kernel_size=3,
                    padding=dilation,
                    dilation=dilation,
                    norm1=norm,
                    activation1=copy.deepcopy(activation),
                    norm2=norm,
                    activation2=copy.deepcopy(activation),
                )
                if use_depthwise_separable_conv
                else conv(in_channels, 3, dilation)
            )
        # a batch norm over one pixel per image has nothing to normalise
        pool = nn.AvgPool2d(pool_kernel_size, 1) if pool_kernel_size else nn.AdaptiveAvgPool2d(1)
        pooled = conv(in_channels, 1, 1, use_norm=pool_kernel_size is not None)
        self.convs.append(nn.Sequential(pool, pooled))
        self.project = conv(5 * out_channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to `x` (N, C, H, W); returns (N, out_channels, H, W).

        Raises:
            ValueError: if H or W is not a multiple of the pooling kernel.
        """
        size = x.shape[-2:]
        kernel = self.pool_kernel_size
        if kernel is not None and (size[0] % kernel[0] or size[1] % kernel[1]):
            raise ValueError(
                f"ASPP: expected a map whose size is a multiple of pool_kernel_size={kernel}, "
                f"got {tuple(size)}"
            )
        branches = [conv(x) for conv in self.convs]
        branches[-1] = F.interpolate(branches[-1], size=size, mode="bilinear", align_corners=False)
        out: Tensor = self.project(torch.cat(branches, dim=1))
        if self.dropout == 0 or not self.training:
            return out
        return F.dropout(out, self.dropout)
