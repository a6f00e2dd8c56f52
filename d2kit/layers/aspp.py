"""Atrous spatial pyramid pooling."""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2kit.layers.batch_norm import get_norm
from d2kit.layers.blocks import DepthwiseSeparableConv2d
from d2kit.layers.weight_init import xavier_fill
from d2kit.layers.wrappers import Conv2d

__all__ = ["ASPP"]

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
        out = self.project(torch.cat(branches, dim=1))
        if self.dropout == 0 or not self.training:
            return out
        return F.dropout(out, self.dropout)
