"""ResNet and ResNeXt, with frozen, batch, synchronised or group normalisation.

Source: He et al., Deep Residual Learning (2016); Xie et al., Aggregated Residual Transformations
(2017) for groups; Yu and Koltun (2016) for dilation; Dai et al. (2017) and Zhu et al. (2019) for
deformable stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2kit.config import CfgNode
from d2kit.layers import (
    CNNBlockBase,
    Conv2d,
    DeformConv,
    FrozenBatchNorm2d,
    ModulatedDeformConv,
    ShapeSpec,
    get_norm,
)
from d2kit.layers.blocks import msra_fill
from d2kit.modeling.backbone.backbone import BACKBONE_REGISTRY, Backbone
from d2kit.utils.registry import nearest_names

__all__ = [
    "BasicBlock",
    "BasicStem",
    "BottleneckBlock",
    "DeformBottleneckBlock",
    "ResNet",
    "ResNetBlockBase",
    "build_resnet_backbone",
    "make_stage",
]


def conv_norm(in_channels: int, out_channels: int, kernel: int, norm: str, **kwargs: Any) -> Conv2d:
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
    return conv_norm(in_channels, out_channels, 1, norm, stride=stride)


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
        self.conv1 = conv_norm(in_channels, out_channels, 3, norm, stride=stride)
        self.conv2 = conv_norm(out_channels, out_channels, 3, norm)

    def branch(self, x: Tensor) -> Tensor:
        """The two convolutions."""
        found: Tensor = self.conv2(F.relu_(self.conv1(x)))
        return found


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
        self.conv1 = conv_norm(in_channels, bottleneck_channels, 1, norm, stride=stride_1x1)
        self.conv2 = conv_norm(
            bottleneck_channels,
            bottleneck_channels,
            3,
            norm,
            stride=stride_3x3,
            groups=num_groups,
            dilation=dilation,
        )
        self.conv3 = conv_norm(bottleneck_channels, out_channels, 1, norm)

    def branch(self, x: Tensor) -> Tensor:
        """The three convolutions."""
        found: Tensor = self.conv3(F.relu_(self.conv2(F.relu_(self.conv1(x)))))
        return found


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
        self.conv1 = conv_norm(in_channels, bottleneck_channels, 1, norm, stride=stride_1x1)
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
        self.conv3 = conv_norm(bottleneck_channels, out_channels, 1, norm)

    def branch(self, x: Tensor) -> Tensor:
        """The three convolutions, the second one deformable."""
        out = F.relu_(self.conv1(x))
        offset = self.conv2_offset(out)
        if self.deform_modulated:
            mask = torch.sigmoid(offset[:, self._offset_channels :])
            out = self.conv2(out, offset[:, : self._offset_channels], mask)
        else:
            out = self.conv2(out, offset)
        found: Tensor = self.conv3(F.relu_(out))
        return found


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
        self.conv1 = conv_norm(in_channels, out_channels, 7, norm, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of an image batch.

        Args:
            x: float (N, in_channels, H, W).

        Returns:
            Float (N, out_channels, H / 4, W / 4).
        """
        return F.max_pool2d(F.relu_(self.conv1(x)), kernel_size=3, stride=2, padding=1)


ResNetBlockBase = CNNBlockBase

_BLOCKS_PER_STAGE = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
FIRST_BOTTLENECK_DEPTH = 50  # shallower networks are made of BasicBlock


def _blocks_per_stage(depth: int) -> tuple[int, ...]:
    if depth not in _BLOCKS_PER_STAGE:
        raise ValueError(f"ResNet depth must be one of {list(_BLOCKS_PER_STAGE)}, got {depth}.")
    return _BLOCKS_PER_STAGE[depth]


class ResNet(Backbone):
    """A stem and residual stages `res2`, `res3`, ... with named outputs.

    Args:
        stem: the first block; has `stride` and `out_channels`.
        stages: for each stage its blocks, in order.
        num_classes: where given, average pooling and a linear layer (feature `linear`) follow.
        out_features: names among `stem`, `res2`, ..., `linear`; by default the last one. Stages
            behind the last wanted one are not kept.
        freeze_at: number of leading stages whose weights stay as they are; see `freeze`.

    Raises:
        ValueError: a name in `out_features` does not exist.
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[Sequence[CNNBlockBase]],
        num_classes: int | None = None,
        out_features: Sequence[str] | None = None,
        freeze_at: int = 0,
    ) -> None:
        super().__init__()
        names = [f"res{i + 2}" for i in range(len(stages))]
        known = ["stem", *names, *(["linear"] if num_classes is not None else [])]
        if out_features is None:
            out_features = known[-1:]
        check_out_features(out_features, known)
        kept = len(stages)
        if "linear" not in out_features:
            kept = max(known.index(name) for name in out_features)

        self.stem = stem
        self.num_classes = num_classes
        self.stage_names = tuple(names[:kept])
        stride, channels = int(stem.stride), int(stem.out_channels)  # type: ignore[arg-type]
        self._out_feature_strides = {"stem": stride}
        self._out_feature_channels = {"stem": channels}
        self.stages: list[nn.Sequential] = []  # plain list: the modules are registered by name
        for name, blocks in zip(self.stage_names, stages, strict=False):
            stage = nn.Sequential(*blocks)
            self.add_module(name, stage)
            self.stages.append(stage)
            for block in blocks:
                stride *= block.stride
            channels = blocks[-1].out_channels
            self._out_feature_strides[name] = stride
            self._out_feature_channels[name] = channels
        if num_classes is not None:
            self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
            self.linear = nn.Linear(channels, num_classes)
            nn.init.normal_(self.linear.weight, std=0.01)  # He et al. (2016) train with this
        self._out_features = list(out_features)
        self.freeze(freeze_at)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the wanted features of an image batch.

        Args:
            x: float (N, C, H, W).

        Returns:
            Name to (N, C_f, H / stride, W / stride); `linear` is (N, num_classes).

        Raises:
            ValueError: `x` has not four dimensions.
        """
        if x.dim() != 4:
            raise ValueError(f"ResNet: expected images (N, C, H, W), got shape {tuple(x.shape)}.")
        wanted: dict[str, Tensor] = {}
        for name in ("stem", *self.stage_names):
            x = getattr(self, name)(x)
            if name in self._out_features:
                wanted[name] = x
        if "linear" in self._out_features:
            wanted["linear"] = self.linear(self.avgpool(x).flatten(1))
        return wanted

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return channels and stride of every output feature, by name."""
        return {
            name: ShapeSpec(
                channels=self._out_feature_channels.get(name, self.num_classes),
                stride=self._out_feature_strides.get(name),
            )
            for name in self._out_features
        }

    def freeze(self, freeze_at: int = 0) -> ResNet:
        """Fix the weights of the first stages and turn their batch norms into frozen ones.

        Args:
            freeze_at: 0 freezes nothing, 1 the stem, 2 the stem and `res2`, and so on.

        Returns:
            This network.
        """
        if freeze_at >= 1 and hasattr(self.stem, "freeze"):
            self.stem.freeze()  # type: ignore[operator]
        for stage in self.stages[: max(freeze_at - 1, 0)]:
            for block in stage:
                block.freeze()  # type: ignore[operator]
        return self

    @staticmethod
    def make_stage(
        block_class: type[CNNBlockBase],
        num_blocks: int,
        *,
        in_channels: int,
        out_channels: int,
        **kwargs: Any,
    ) -> list[CNNBlockBase]:
        """Make the blocks of one stage.

        Args:
            block_class: class of every block.
            num_blocks: how many.
            in_channels: channels that enter the first block.
            out_channels: channels that leave every block.
            **kwargs: arguments of every block. `<name>_per_block` is a sequence with one value of
                argument `<name>` for each block.

        Returns:
            The blocks, in order.

        Raises:
            ValueError: a `*_per_block` sequence has not `num_blocks` entries, or its argument
                is given a second time without the suffix.
        """
        suffix = "_per_block"
        common = {key: value for key, value in kwargs.items() if not key.endswith(suffix)}
        varying = {
            key.removesuffix(suffix): value for key, value in kwargs.items() if key.endswith(suffix)
        }
        for key, values in varying.items():
            if len(values) != num_blocks or key in common:
                raise ValueError(
                    f"make_stage: {key}{suffix} must have {num_blocks} entries (got {len(values)})"
                    f" and exclude {key}{' (also given)' if key in common else ''}."
                )
        return [
            block_class(
                in_channels if i == 0 else out_channels,
                out_channels,
                **common,
                **{key: values[i] for key, values in varying.items()},
            )
            for i in range(num_blocks)
        ]

    @staticmethod
    def make_default_stages(
        depth: int, block_class: type[CNNBlockBase] | None = None, **kwargs: object
    ) -> list[list[CNNBlockBase]]:
        """Make the four stages of a standard ResNet.

        Args:
            depth: 18, 34, 50, 101 or 152.
            block_class: by default `BasicBlock` below depth 50, `BottleneckBlock` from there on.
            **kwargs: arguments of every block, `norm` for instance; not strides or channels.

        Returns:
            Four lists of blocks.

        Raises:
            ValueError: `depth` is none of the five.
        """
        counts = _blocks_per_stage(depth)
        basic = depth < FIRST_BOTTLENECK_DEPTH
        if block_class is None:
            block_class = BasicBlock if basic else BottleneckBlock
        in_channels, out_channels = 64, 64 if basic else 256
        stages = []
        for i, count in enumerate(counts):
            extra = {} if basic else {"bottleneck_channels": out_channels // 4}
            stages.append(
                ResNet.make_stage(
                    block_class,
                    count,
                    in_channels=in_channels,
                    out_channels=out_channels,
                    stride_per_block=[1 if i == 0 else 2] + [1] * (count - 1),
                    **{**extra, **kwargs},
                )
            )
            in_channels, out_channels = out_channels, 2 * out_channels
        return stages


def check_out_features(out_features: Sequence[str], known: list[str]) -> None:
    for name in out_features:
        if name not in known:
            raise ValueError(
                f"ResNet out_features: unknown name {name!r}, expected some of {known}; "
                f"nearest: {nearest_names(name, known)}."
            )
    if not out_features:
        raise ValueError(f"ResNet out_features must name at least one of {known}, got none.")


def make_stage(*args: Any, **kwargs: Any) -> list[CNNBlockBase]:
    """Call `ResNet.make_stage`; kept because user code imports it from here."""
    return ResNet.make_stage(*args, **kwargs)


def _check_basic_block_config(node: CfgNode) -> None:
    """Raise where `node`, MODEL.RESNETS, asks for what BasicBlock (ResNet-18/34) cannot do."""
    demands = {
        "RES2_OUT_CHANNELS": (node.RES2_OUT_CHANNELS, 64),
        "RES5_DILATION": (node.RES5_DILATION, 1),
        "NUM_GROUPS": (node.NUM_GROUPS, 1),
        "DEFORM_ON_PER_STAGE": (any(node.DEFORM_ON_PER_STAGE), False),
    }
    for key, (got, expected) in demands.items():
        if got != expected:
            raise ValueError(
                f"MODEL.RESNETS.{key} must be {expected} for MODEL.RESNETS.DEPTH {node.DEPTH} "
                f"(its blocks have no bottleneck), got {got}; set it in the config."
            )


def stage_arguments(node: CfgNode, index: int) -> dict[str, Any]:
    """Arguments of `make_stage` for `res{index + 2}` from MODEL.RESNETS, channels excepted."""
    dilation = node.RES5_DILATION if index == 3 else 1
    count = _blocks_per_stage(node.DEPTH)[index]
    first_stride = 1 if index == 0 or dilation > 1 else 2
    arguments: dict[str, Any] = {
        "num_blocks": count,
        "stride_per_block": [first_stride] + [1] * (count - 1),
        "norm": node.NORM,
    }
    if node.DEPTH < FIRST_BOTTLENECK_DEPTH:
        return {**arguments, "block_class": BasicBlock}
    arguments.update(
        block_class=BottleneckBlock,
        bottleneck_channels=node.NUM_GROUPS * node.WIDTH_PER_GROUP * 2**index,
        stride_in_1x1=node.STRIDE_IN_1X1,
        dilation=dilation,
        num_groups=node.NUM_GROUPS,
    )
    if node.DEFORM_ON_PER_STAGE[index]:
        arguments.update(
            block_class=DeformBottleneckBlock,
            deform_modulated=node.DEFORM_MODULATED,
            deform_num_groups=node.DEFORM_NUM_GROUPS,
        )
    return arguments


def set_norm_eps(network: nn.Module, eps: float) -> None:
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm2d, FrozenBatchNorm2d)):
            module.eps = eps


@BACKBONE_REGISTRY.register()
def build_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """Build the ResNet that `cfg.MODEL.RESNETS` and `cfg.MODEL.BACKBONE.FREEZE_AT` describe.

    Args:
        cfg: a full config.
        input_shape: its `channels` enter the stem.

    Returns:
        The network, with only the stages that `OUT_FEATURES` needs.

    Raises:
        ValueError: a key of `MODEL.RESNETS` has a value that this depth cannot have.
    """
    node = cfg.MODEL.RESNETS
    _blocks_per_stage(node.DEPTH)
    if node.DEPTH < FIRST_BOTTLENECK_DEPTH:
        _check_basic_block_config(node)
    if node.RES5_DILATION not in {1, 2}:
        raise ValueError(f"MODEL.RESNETS.RES5_DILATION must be 1 or 2, got {node.RES5_DILATION}.")
    known = ["stem", "res2", "res3", "res4", "res5"]
    check_out_features(node.OUT_FEATURES, known)
    stem = BasicStem(
        in_channels=input_shape.channels or 3,
        out_channels=node.STEM_OUT_CHANNELS,
        norm=node.NORM,
    )
    in_channels, out_channels = node.STEM_OUT_CHANNELS, node.RES2_OUT_CHANNELS
    stages = []
    for index in range(max(known.index(name) for name in node.OUT_FEATURES)):
        stages.append(
            ResNet.make_stage(
                in_channels=in_channels,
                out_channels=out_channels,
                **stage_arguments(node, index),
            )
        )
        in_channels, out_channels = out_channels, 2 * out_channels
    network = ResNet(
        stem, stages, out_features=node.OUT_FEATURES, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT
    )
    set_norm_eps(network, node.NORM_EPS)
    return network
