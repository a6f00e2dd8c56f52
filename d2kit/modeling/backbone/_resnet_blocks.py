"""The blocks of a ResNet. Public names are re-exported by `resnet`."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2kit.layers import CNNBlockBase, Conv2d, DeformConv, ModulatedDeformConv, get_norm
from d2kit.layers._weight_init import msra_fill


def _conv_norm(
    in_channels: int, out_channels: int, kernel: int, norm: str, **kwargs: Any
) -> Conv2d:
    """A convolution without bias that keeps the size (at stride 1), and its normalisation."""
    conv = Conv2d(
        in_channels,
        out_channels,
        kernel_size=kernel,
        padding=kernel // 2 * kwargs.get("dilation", 1),
        bias=False,
        norm=get_norm(norm, out_channels),
        **kwargs,
    )
    msra_fill(conv)
    return conv


def _projection(in_channels: int, out_channels: int, stride: int, norm: str) -> nn.Module | None:
    """The 1x1 convolution of the shortcut, where the channels change."""
    if in_channels == out_channels:
        return None
    return _conv_norm(in_channels, out_channels, 1, norm, stride=stride)


class _ResidualBlock(CNNBlockBase):
    """Shortcut plus residual branch, then ReLU; the addition and the ReLU are in place.

    In place is safe here: the branch ends with a normalisation, none of which needs its output
    for the backward pass, and the sum is needed by the ReLU alone.
    """

    shortcut: nn.Module | None

    def branch(self, x: Tensor) -> Tensor:
        """The residual branch, before the addition."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the block.

        Args:
            x: float (N, in_channels, H, W).

        Returns:
            Float (N, out_channels, H / stride, W / stride).
        """
        out = self.branch(x)
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)


class BasicBlock(_ResidualBlock):
    """Two 3x3 convolutions and a shortcut: the block of ResNet-18 and 34.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output; where they differ, the shortcut is a convolution.
        stride: stride of the first convolution.
        norm: name of a normalisation, as `d2kit.layers.get_norm` takes it.

    Source: He et al. (2016), figure 5, left.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, stride: int = 1, norm: str = "BN"
    ) -> None:
        super().__init__(in_channels, out_channels, stride)
        self.shortcut = _projection(in_channels, out_channels, stride, norm)
        self.conv1 = _conv_norm(in_channels, out_channels, 3, norm, stride=stride)
        self.conv2 = _conv_norm(out_channels, out_channels, 3, norm)

    def branch(self, x: Tensor) -> Tensor:
        """The two convolutions."""
        return self.conv2(F.relu_(self.conv1(x)))


class BottleneckBlock(_ResidualBlock):
    """1x1, 3x3 and 1x1 convolution and a shortcut: the block of ResNet-50 and deeper.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output; where they differ, the shortcut is a convolution.
        bottleneck_channels: channels of the 3x3 convolution.
        stride: stride of the block.
        num_groups: groups of the 3x3 convolution (ResNeXt: 32).
        norm: name of a normalisation, as `d2kit.layers.get_norm` takes it.
        stride_in_1x1: the first 1x1 convolution has the stride (the original, "MSRA"), not the
            3x3 one (ResNeXt, torchvision).
        dilation: dilation of the 3x3 convolution.

    Source: He et al. (2016), figure 5, right; Xie et al. (2017), figure 3c.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        bottleneck_channels: int,
        stride: int = 1,
        num_groups: int = 1,
        norm: str = "BN",
        stride_in_1x1: bool = False,
        dilation: int = 1,
    ) -> None:
        super().__init__(in_channels, out_channels, stride)
        self.shortcut = _projection(in_channels, out_channels, stride, norm)
        stride_1x1, stride_3x3 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = _conv_norm(in_channels, bottleneck_channels, 1, norm, stride=stride_1x1)
        self.conv2 = _conv_norm(
            bottleneck_channels,
            bottleneck_channels,
            3,
            norm,
            stride=stride_3x3,
            groups=num_groups,
            dilation=dilation,
        )
        self.conv3 = _conv_norm(bottleneck_channels, out_channels, 1, norm)

    def branch(self, x: Tensor) -> Tensor:
        """The three convolutions."""
        return self.conv3(F.relu_(self.conv2(F.relu_(self.conv1(x)))))


class DeformBottleneckBlock(_ResidualBlock):
    """A `BottleneckBlock` whose 3x3 convolution samples at learned offsets.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output; where they differ, the shortcut is a convolution.
        bottleneck_channels: channels of the 3x3 convolution.
        stride: stride of the block.
        num_groups: groups of the 3x3 convolution.
        norm: name of a normalisation, as `d2kit.layers.get_norm` takes it.
        stride_in_1x1: the first 1x1 convolution has the stride, not the 3x3 one.
        dilation: dilation of the 3x3 convolution.
        deform_modulated: also weight each sample by a learned factor in (0, 1) (version 2).
        deform_num_groups: channel groups with offsets of their own.

    Source: Dai et al., Deformable Convolutional Networks (2017), section 2.1; Zhu et al.,
    Deformable ConvNets v2 (2019), section 3.2.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        bottleneck_channels: int,
        stride: int = 1,
        num_groups: int = 1,
        norm: str = "BN",
        stride_in_1x1: bool = False,
        dilation: int = 1,
        deform_modulated: bool = False,
        deform_num_groups: int = 1,
    ) -> None:
        super().__init__(in_channels, out_channels, stride)
        self.deform_modulated = deform_modulated
        self.shortcut = _projection(in_channels, out_channels, stride, norm)
        stride_1x1, stride_3x3 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = _conv_norm(in_channels, bottleneck_channels, 1, norm, stride=stride_1x1)
        self._offset_channels = 2 * 9 * deform_num_groups  # y and x of each of the 3x3 taps
        mask_channels = 9 * deform_num_groups if deform_modulated else 0
        self.conv2_offset = Conv2d(
            bottleneck_channels,
            self._offset_channels + mask_channels,
            kernel_size=3,
            stride=stride_3x3,
            padding=dilation,
            dilation=dilation,
        )
        nn.init.zeros_(self.conv2_offset.weight)  # training starts from the undeformed grid
        nn.init.zeros_(self.conv2_offset.bias)  # type: ignore[arg-type]
        conv_class = ModulatedDeformConv if deform_modulated else DeformConv
        self.conv2 = conv_class(
            bottleneck_channels,
            bottleneck_channels,
            kernel_size=3,
            stride=stride_3x3,
            padding=dilation,
            bias=False,
            groups=num_groups,
            dilation=dilation,
            deformable_groups=deform_num_groups,
            norm=get_norm(norm, bottleneck_channels),
        )
        msra_fill(self.conv2)
        self.conv3 = _conv_norm(bottleneck_channels, out_channels, 1, norm)

    def branch(self, x: Tensor) -> Tensor:
        """The three convolutions, the second one deformable."""
        out = F.relu_(self.conv1(x))
        offset = self.conv2_offset(out)
        if self.deform_modulated:
            mask = torch.sigmoid(offset[:, self._offset_channels :])
            out = self.conv2(out, offset[:, : self._offset_channels], mask)
        else:
            out = self.conv2(out, offset)
        return self.conv3(F.relu_(out))


class BasicStem(CNNBlockBase):
    """A 7x7 convolution of stride 2 and a 3x3 max pooling of stride 2.

    Args:
        in_channels: channels of the image.
        out_channels: channels of the output.
        norm: name of a normalisation, as `d2kit.layers.get_norm` takes it.

    Source: He et al. (2016), table 1, conv1.
    """

    def __init__(self, in_channels: int = 3, out_channels: int = 64, norm: str = "BN") -> None:
        super().__init__(in_channels, out_channels, 4)
        self.conv1 = _conv_norm(in_channels, out_channels, 7, norm, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of an image batch.

        Args:
            x: float (N, in_channels, H, W).

        Returns:
            Float (N, out_channels, H / 4, W / 4).
        """
        return F.max_pool2d(F.relu_(self.conv1(x)), kernel_size=3, stride=2, padding=1)
