"""RegNet, and the wider family (AnyNet) of networks with stages of equal blocks.

Parameter names are those of the published checkpoints: `stem.conv`, `s1.b1.f.a`, `s1.b1.f.a_bn`.

Source: Radosavovic et al., Designing Network Design Spaces (2020), sections 3.2 and 3.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple

from torch import Tensor, nn

from d2kit.layers import CNNBlockBase, get_norm
from d2kit.layers.blocks import msra_fill
from d2kit.modeling.backbone.backbone import Backbone
from d2kit.utils.registry import nearest_names

__all__ = [
    "SE",
    "AnyNet",
    "RegNet",
    "ResBasicBlock",
    "ResBottleneckBlock",
    "ResStem",
    "SimpleStem",
    "VanillaBlock",
    "regnet_widths",
]

Norm = str | Callable[[int], nn.Module] | None  # see `get_norm`


Activation = Callable[[], nn.Module]


def _relu() -> nn.Module:
    return nn.ReLU(inplace=True)


class _Conv(NamedTuple):
    """One convolution of a branch: its name, kernel side, channels, stride and groups."""

    name: str
    kernel: int
    inputs: int
    outputs: int
    stride: int = 1
    groups: int = 1


def _add_conv(module: nn.Module, conv: _Conv, norm: Norm, norm_name: str) -> None:
    """Register a convolution without bias that keeps the size (at stride 1), and its norm."""
    layer = nn.Conv2d(
        conv.inputs,
        conv.outputs,
        conv.kernel,
        stride=conv.stride,
        padding=conv.kernel // 2,
        groups=conv.groups,
        bias=False,
    )
    msra_fill(layer)
    module.add_module(conv.name, layer)
    module.add_module(norm_name, get_norm(norm, conv.outputs) or nn.Identity())


class SimpleStem(CNNBlockBase):
    """A 3x3 convolution of stride 2 with norm and activation.

    Args:
        w_in: channels of the input.
        w_out: channels of the output.
        norm: as `d2kit.layers.get_norm` takes it.
        activation_class: makes the activation; None for ReLU.

    Source: Radosavovic et al. (2020), figure 3.
    """

    _kernel = 3
    _stride = 2

    def __init__(
        self, w_in: int, w_out: int, norm: Norm, activation_class: Activation | None = None
    ) -> None:
        super().__init__(w_in, w_out, self._stride)
        _add_conv(self, _Conv("conv", self._kernel, w_in, w_out, 2), norm, "bn")
        self.af = (activation_class or _relu)()

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, w_out, H / stride, W / stride) for (N, w_in, H, W)."""
        found: Tensor = self.af(self.bn(self.conv(x)))  # type: ignore[operator]
        return found


class ResStem(SimpleStem):
    """The stem of ResNet: a 7x7 convolution of stride 2, norm, activation and 3x3 max-pooling.

    Args:
        w_in: channels of the input.
        w_out: channels of the output.
        norm: as `d2kit.layers.get_norm` takes it.
        activation_class: makes the activation; None for ReLU.

    Source: He et al., Deep Residual Learning (2016), table 1.
    """

    _kernel = 7
    _stride = 4

    def __init__(
        self, w_in: int, w_out: int, norm: Norm, activation_class: Activation | None = None
    ) -> None:
        super().__init__(w_in, w_out, norm, activation_class)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, w_out, H / 4, W / 4) for (N, w_in, H, W)."""
        found: Tensor = self.pool(super().forward(x))
        return found


class SE(nn.Module):
    """Scales each channel by a factor in (0, 1) that depends on the means of all.

    Args:
        w_in: channels.
        w_se: channels of the hidden layer.
        activation_class: makes its activation; None for ReLU.

    Source: Hu et al. (2018), section 3.
    """

    def __init__(self, w_in: int, w_se: int, activation_class: Activation | None = None) -> None:
        super().__init__()
        self.f_ex = nn.Sequential(
            nn.Conv2d(w_in, w_se, 1),
            (activation_class or _relu)(),
            nn.Conv2d(w_se, w_in, 1),
            nn.Sigmoid(),
        )
        for layer in (self.f_ex[0], self.f_ex[2]):
            msra_fill(layer)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Scale `x` (N, C, H, W)."""
        found: Tensor = x * self.f_ex(x.mean((2, 3), keepdim=True))
        return found


class _Branch(nn.Module):
    """Convolutions in a row, each with its norm; activations between them.

    Args:
        convs: in order; the norm of `a` is called `a_bn`.
        norm: as `get_norm` takes it.
        activation: makes the activations.
        se: channels of the hidden layer of squeeze-and-excitation after `b`, or 0.
    """

    def __init__(
        self, convs: Sequence[_Conv], norm: Norm, activation: Activation, se: int = 0
    ) -> None:
        super().__init__()
        self._names = [conv.name for conv in convs]
        for conv in convs:
            _add_conv(self, conv, norm, f"{conv.name}_bn")
            if conv.name == "b" and se:
                self.se = SE(conv.outputs, se, activation)
        self._between = activation()

    def forward(self, x: Tensor) -> Tensor:
        for name in self._names:
            x = getattr(self, f"{name}_bn")(getattr(self, name)(x))
            if name != self._names[-1]:
                x = self._between(x)
            if name == "b" and hasattr(self, "se"):
                x = self.se(x)
        return x


class VanillaBlock(CNNBlockBase):
    """Two 3x3 convolutions, each with norm and activation, without a shortcut.

    Args:
        w_in: channels of the input.
        w_out: channels of the output.
        stride: of the first convolution.
        norm: as `d2kit.layers.get_norm` takes it.
        activation_class: makes the activations; None for ReLU.
        bottleneck_ratio: not used, as by all blocks without a bottleneck.
        group_width: not used.
        se_ratio: not used.

    Source: Radosavovic et al., On Network Design Spaces for Visual Recognition (2019), section 3.
    """

    def __init__(
        self,
        w_in: int,
        w_out: int,
        stride: int,
        norm: Norm,
        activation_class: Activation | None = None,
        *,
        bottleneck_ratio: float = 1.0,
        group_width: int = 1,
        se_ratio: float = 0.0,
    ) -> None:
        super().__init__(w_in, w_out, stride)
        self._build(norm, activation_class or _relu, bottleneck_ratio, group_width, se_ratio)

    def _build(
        self, norm: Norm, activation: Activation, bottleneck: float, group_width: int, se: float
    ) -> None:
        del bottleneck, group_width, se
        _add_conv(
            self, _Conv("a", 3, self.in_channels, self.out_channels, self.stride), norm, "a_bn"
        )
        _add_conv(self, _Conv("b", 3, self.out_channels, self.out_channels), norm, "b_bn")
        self.af = activation()

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, w_out, H / stride, W / stride) for (N, w_in, H, W)."""
        x = self.af(self.a_bn(self.a(x)))  # type: ignore[operator]
        found: Tensor = self.af(self.b_bn(self.b(x)))  # type: ignore[operator]
        return found


class ResBasicBlock(VanillaBlock):
    """Two 3x3 convolutions beside a shortcut; arguments as of `VanillaBlock`.

    Source: He et al., Deep Residual Learning (2016), figure 5, left.
    """

    def _build(
        self, norm: Norm, activation: Activation, bottleneck: float, group_width: int, se: float
    ) -> None:
        convs = self._convs(bottleneck, group_width)
        # the paper's ratio is of the channels that enter the block, not those of the bottleneck
        hidden = round(self.in_channels * se) if len(convs) == 3 else 0
        self.f = _Branch(convs, norm, activation, hidden)
        if self.in_channels != self.out_channels or self.stride != 1:
            shortcut = _Conv("proj", 1, self.in_channels, self.out_channels, self.stride)
            _add_conv(self, shortcut, norm, "bn")
        self.af = activation()

    def _convs(self, bottleneck: float, group_width: int) -> list[_Conv]:
        del bottleneck, group_width
        return [
            _Conv("a", 3, self.in_channels, self.out_channels, self.stride),
            _Conv("b", 3, self.out_channels, self.out_channels),
        ]

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, w_out, H / stride, W / stride) for (N, w_in, H, W)."""
        shortcut = self.bn(self.proj(x)) if hasattr(self, "proj") else x  # type: ignore[operator]
        found: Tensor = self.af(shortcut + self.f(x))
        return found


class ResBottleneckBlock(ResBasicBlock):
    """The X and Y block: 1x1, grouped 3x3 and 1x1 convolutions beside a shortcut.

    Args:
        w_in: channels of the input.
        w_out: channels of the output.
        stride: of the 3x3 convolution.
        norm: as `d2kit.layers.get_norm` takes it.
        activation_class: makes the activations; None for ReLU.
        bottleneck_ratio: channels of the 3x3 convolution over those of the output.
        group_width: channels of each of its groups.
        se_ratio: hidden channels of squeeze-and-excitation over `w_in`; 0 for none.

    Source: Radosavovic et al. (2020), figure 4.
    """

    def _convs(self, bottleneck: float, group_width: int) -> list[_Conv]:
        inner = round(self.out_channels * bottleneck)
        if inner % group_width:
            raise ValueError(
                f"ResBottleneckBlock: {inner} channels of the 3x3 convolution are no multiple of "
                f"group_width {group_width}; take other widths (RegNet rounds them by itself)."
            )
        return [
            _Conv("a", 1, self.in_channels, inner),
            _Conv("b", 3, inner, inner, self.stride, inner // group_width),
            _Conv("c", 1, inner, self.out_channels),
        ]


class AnyNet(Backbone):
    """A stem and stages `s1`, `s2`, ... of equal blocks, with named outputs.

    Args:
        stem_class: class of the stem, called as `SimpleStem`.
        stem_width: its channels.
        block_class: class of every block, called as `ResBottleneckBlock`.
        depths: blocks of each stage.
        widths: channels of each stage.
        group_widths: channels of each group, for each stage.
        strides: of the first block of each stage.
        bottleneck_ratios: inner over outer channels, for each stage.
        se_ratio: hidden channels of squeeze-and-excitation over a block's input; 0 for none.
        activation_class: makes all activations; None for ReLU.
        freeze_at: leading parts that are not trained: 0 none, 1 the stem, 2 the stem and s1, ...
        norm: as `d2kit.layers.get_norm` takes it.
        out_features: names among `stem`, `s1`, ...; by default the last one. Stages behind the
            last wanted one are not kept.
        in_channels: channels of the images.

    Raises:
        ValueError: lists of different lengths, or an unknown output.

    Source: Radosavovic et al. (2020), section 3.2.
    """

    def __init__(
        self,
        *,
        stem_class: Callable[..., CNNBlockBase],
        stem_width: int,
        block_class: Callable[..., CNNBlockBase],
        depths: Sequence[int],
        widths: Sequence[int],
        group_widths: Sequence[int],
        strides: Sequence[int],
        bottleneck_ratios: Sequence[float],
        se_ratio: float = 0.0,
        activation_class: Activation | None = None,
        freeze_at: int = 0,
        norm: Norm = "BN",
        out_features: Sequence[str] | None = None,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        columns = (depths, widths, group_widths, strides, bottleneck_ratios)
        if len({len(column) for column in columns}) != 1:
            raise ValueError(
                "AnyNet: depths, widths, group_widths, strides and bottleneck_ratios need one "
                f"entry for each stage, got {[list(column) for column in columns]}."
            )
        known = ["stem", *(f"s{i + 1}" for i in range(len(depths)))]
        self._out_features = list(known[-1:] if out_features is None else out_features)
        kept = _last_wanted(self._out_features, known)
        self.stem = stem_class(in_channels, stem_width, norm, activation_class)
        self._parts = known[: kept + 1]
        channels, stride = stem_width, self.stem.stride
        self._out_feature_channels = {"stem": channels}
        self._out_feature_strides = {"stem": stride}
        for name, *column in zip(self._parts[1:], *columns, strict=False):
            depth, width, group_width, first_stride, ratio = column
            stage = nn.Sequential()
            for i in range(depth):
                block = block_class(
                    channels,
                    width,
                    first_stride if i == 0 else 1,
                    norm,
                    activation_class,
                    bottleneck_ratio=ratio,
                    group_width=group_width,
                    se_ratio=se_ratio,
                )
                stage.add_module(f"b{i + 1}", block)
                channels = width
            self.add_module(name, stage)
            stride *= first_stride
            self._out_feature_channels[name] = channels
            self._out_feature_strides[name] = stride
        self.freeze(freeze_at)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the wanted features of an image batch.

        Args:
            x: float (N, in_channels, H, W).

        Returns:
            Name to (N, C_f, H / stride, W / stride), rounded up.

        Raises:
            ValueError: `x` has not four dimensions.
        """
        if x.dim() != 4:
            raise ValueError(f"AnyNet: expected images (N, C, H, W), got shape {tuple(x.shape)}.")
        features = {}
        for name in self._parts:
            x = getattr(self, name)(x)
            if name in self._out_features:
                features[name] = x
        return features

    def freeze(self, freeze_at: int = 0) -> AnyNet:
        """Fix the weights of the first parts and turn their batch norms into frozen ones.

        Args:
            freeze_at: 0 freezes nothing, 1 the stem, 2 the stem and `s1`, and so on.

        Returns:
            This network.
        """
        for name in self._parts[: max(freeze_at, 0)]:
            for block in getattr(self, name).modules():
                if isinstance(block, CNNBlockBase):
                    block.freeze()
        return self


def _last_wanted(out_features: Sequence[str], known: list[str]) -> int:
    """Return the index in `known` of the last of the wanted outputs."""
    for name in out_features:
        if name not in known:
            raise ValueError(
                f"AnyNet out_features: unknown name {name!r}, expected some of {known}; "
                f"nearest: {nearest_names(name, known)}."
            )
    if not out_features:
        raise ValueError(f"AnyNet out_features must name at least one of {known}, got none.")
    return max(known.index(name) for name in out_features)


def regnet_widths(depth: int, w_a: float, w_0: int, w_m: float) -> tuple[list[int], list[int]]:
    """Return channels and number of blocks of each stage of a RegNet.

    The channels of block j would be `w_0 + w_a * j`; they are rounded to the nearest power of
    `w_m` times `w_0`, then to a multiple of 8. Blocks of equal channels are a stage.

    Args:
        depth: blocks of all stages.
        w_a: slope of the channels over the blocks, at least 0.
        w_0: channels at the start, a multiple of 8.
        w_m: factor between the channels of stages, above 1.

    Returns:
        Channels and numbers of blocks, stage by stage.

    Raises:
        ValueError: parameters outside these ranges.

    Source: Radosavovic et al. (2020), equations 2 to 4.
    """
    if w_a < 0 or w_0 <= 0 or w_m <= 1 or w_0 % 8 or depth < 1:
        raise ValueError(
            "RegNet needs depth >= 1, w_a >= 0, w_0 a positive multiple of 8 and w_m > 1, got "
            f"depth {depth}, w_a {w_a}, w_0 {w_0}, w_m {w_m}."
        )
    exponents = (round(math.log((w_0 + w_a * j) / w_0, w_m)) for j in range(depth))
    channels = [round(w_0 * w_m**exponent / 8) * 8 for exponent in exponents]
    stages = [(width, len(list(blocks))) for width, blocks in groupby(channels)]
    return [width for width, _ in stages], [count for _, count in stages]


class RegNet(AnyNet):
    """A network whose widths follow a quantised line.

    Args:
        stem_class: class of the stem: `SimpleStem`, `ResStem`.
        stem_width: its channels.
        block_class: class of every block: `ResBottleneckBlock`, ...
        depth: blocks of all stages.
        w_a: slope of the channels over the blocks.
        w_0: channels at the start.
        w_m: factor between the channels of stages.
        group_width: channels of each group.
        stride: of the first block of each stage.
        bottleneck_ratio: inner over outer channels.
        se_ratio: hidden channels of squeeze-and-excitation over a block's input; 0 for X.
        activation_class: makes all activations; None for ReLU.
        freeze_at: see `AnyNet`.
        norm: as `d2kit.layers.get_norm` takes it.
        out_features: names among `stem`, `s1` to `s4`.
        in_channels: channels of the images.

    Raises:
        ValueError: see `regnet_widths` and `AnyNet`.

    Source: Radosavovic et al. (2020), section 3.3.
    """

    def __init__(
        self,
        *,
        stem_class: Callable[..., CNNBlockBase],
        stem_width: int,
        block_class: Callable[..., CNNBlockBase],
        depth: int,
        w_a: float,
        w_0: int,
        w_m: float,
        group_width: int,
        stride: int = 2,
        bottleneck_ratio: float = 1.0,
        se_ratio: float = 0.0,
        activation_class: Activation | None = None,
        freeze_at: int = 0,
        norm: Norm = "BN",
        out_features: Sequence[str] | None = None,
        in_channels: int = 3,
    ) -> None:
        widths, depths = regnet_widths(depth, w_a, w_0, w_m)
        groups = [min(group_width, round(width * bottleneck_ratio)) for width in widths]
        # the grouped convolution needs whole groups: the nearest such number of channels
        inner = [
            max(round(width * bottleneck_ratio / group), 1) * group
            for width, group in zip(widths, groups, strict=True)
        ]
        super().__init__(
            stem_class=stem_class,
            stem_width=stem_width,
            block_class=block_class,
            depths=depths,
            widths=[round(channels / bottleneck_ratio) for channels in inner],
            group_widths=groups,
            strides=[stride] * len(widths),
            bottleneck_ratios=[bottleneck_ratio] * len(widths),
            se_ratio=se_ratio,
            activation_class=activation_class,
            freeze_at=freeze_at,
            norm=norm,
            out_features=out_features,
            in_channels=in_channels,
        )
