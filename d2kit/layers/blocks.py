"""Building blocks of convolutional networks."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from d2kit.layers.batch_norm import FrozenBatchNorm2d, get_norm
from d2kit.layers.weight_init import msra_fill
from d2kit.layers.wrappers import Conv2d

__all__ = ["CNNBlockBase", "DepthwiseSeparableConv2d"]


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

    def freeze(self) -> "CNNBlockBase":
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
        return self.pointwise(self.depthwise(x))
