"""RegNet, and the wider family (AnyNet) of networks with stages of equal blocks.

Parameter names are those of the published checkpoints: `stem.conv`, `s1.b1.f.a`, `s1.b1.f.a_bn`.

Source: Radosavovic et al., Designing Network Design Spaces (2020), sections 3.2 and 3.3.
"""

import math
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from torch import Tensor, nn

from d2kit.layers import CNNBlockBase
from d2kit.modeling.backbone._regnet_blocks import (
    SE,
    Activation,
    ResBasicBlock,
    ResBottleneckBlock,
    ResStem,
    SimpleStem,
    VanillaBlock,
)
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
        norm: Any = "BN",
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

    def freeze(self, freeze_at: int = 0) -> "AnyNet":
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
        norm: Any = "BN",
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
