"""Deformable convolutions on torchvision's operator, on any device."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair
from torchvision.ops import deform_conv2d

__all__ = ["DeformConv", "ModulatedDeformConv"]


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
