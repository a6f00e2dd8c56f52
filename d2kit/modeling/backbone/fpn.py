"""Feature pyramid network.

Source: Lin et al., Feature Pyramid Networks for Object Detection (2017), section 3.
"""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from d2kit.config import CfgNode
from d2kit.layers import Conv2d, ShapeSpec, get_norm
from d2kit.layers.blocks import xavier_fill
from d2kit.modeling.backbone.backbone import BACKBONE_REGISTRY, Backbone
from d2kit.modeling.backbone.resnet import build_resnet_backbone
from d2kit.utils.devices import is_symbolic
from d2kit.utils.registry import nearest_names

__all__ = [
    "FPN",
    "LastLevelMaxPool",
    "LastLevelP6P7",
    "build_resnet_fpn_backbone",
    "build_retinanet_resnet_fpn_backbone",
]


class FPN(Backbone):
    """A top-down path with lateral connections over another backbone.

    Args:
        bottom_up: the backbone below.
        in_features: names of its features to use, fine to coarse; each stride twice the former.
        out_channels: channels of every level.
        norm: name of a normalisation, as `d2kit.layers.get_norm` takes it; "" is none, with bias.
        top_block: module that adds coarser levels; has `num_levels` and `in_feature`, the name of
            a feature of `bottom_up` or of this network.
        fuse_type: "sum" or "avg", how the lateral and the upsampled map are joined.
        square_pad: where positive, batches are padded to a square of that side, in pixels.

    Raises:
        ValueError: an unknown feature or fuse type, or strides that do not double.
    """

    def __init__(
        self,
        bottom_up: Backbone,
        in_features: Sequence[str],
        out_channels: int,
        norm: str = "",
        top_block: nn.Module | None = None,
        fuse_type: str = "sum",
        square_pad: int = 0,
    ) -> None:
        super().__init__()
        shapes = bottom_up.output_shape()
        _check_arguments(in_features, list(shapes), fuse_type)
        strides = [shapes[name].stride or 0 for name in in_features]
        _assert_strides_are_log2_contiguous(strides)
        self.in_features = tuple(in_features)
        self._fuse_type = fuse_type
        self._square_pad = square_pad
        self._size_divisibility = strides[-1]
        self._stages = [int(math.log2(stride)) for stride in strides]
        for name, stage in zip(in_features, self._stages, strict=True):
            lateral = _conv(shapes[name].channels or 0, out_channels, 1, norm)
            self.add_module(f"fpn_lateral{stage}", lateral)
            self.add_module(f"fpn_output{stage}", _conv(out_channels, out_channels, 3, norm))
        self.top_block = top_block
        self.bottom_up = bottom_up
        coarser = 0 if top_block is None else int(top_block.num_levels)  # type: ignore[arg-type]
        top = self._stages[-1] + 1
        levels = [*self._stages, *range(top, top + coarser)]
        self._out_feature_strides = {f"p{level}": 2**level for level in levels}
        self._out_features = list(self._out_feature_strides)
        self._out_feature_channels = dict.fromkeys(self._out_features, out_channels)

    @property
    def size_divisibility(self) -> int:
        """What H and W must be multiples of, in pixels."""
        return self._size_divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        """The side of the square to pad to, in pixels; 0 for none."""
        return {"square_size": self._square_pad}

    @property
    def lateral_convs(self) -> list[nn.Module]:
        """The lateral 1x1 convolutions, coarse to fine."""
        return [getattr(self, f"fpn_lateral{stage}") for stage in reversed(self._stages)]

    @property
    def output_convs(self) -> list[nn.Module]:
        """The 3x3 convolutions of the levels, coarse to fine."""
        return [getattr(self, f"fpn_output{stage}") for stage in reversed(self._stages)]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the pyramid of an image batch.

        Args:
            x: float (N, C, H, W), H and W multiples of `size_divisibility`.

        Returns:
            `p2`, `p3`, ..., fine to coarse, each (N, out_channels, H / stride, W / stride).

        Raises:
            ValueError: H or W is no such multiple.
        """
        features = self.bottom_up(x)
        pyramid: dict[str, Tensor] = {}
        merged: Tensor | None = None
        coarse_to_fine = zip(
            self.in_features[::-1],
            self._stages[::-1],
            self.lateral_convs,
            self.output_convs,
            strict=True,
        )
        for name, stage, lateral_conv, output_conv in coarse_to_fine:
            lateral = lateral_conv(features[name])
            merged = lateral if merged is None else self._fuse(lateral, merged)
            pyramid[f"p{stage}"] = output_conv(merged)
        if self.top_block is not None:
            source = str(self.top_block.in_feature)
            extra = self.top_block(features[source] if source in features else pyramid[source])
            pyramid.update(zip(self._out_features[len(pyramid) :], extra, strict=True))
        return {name: pyramid[name] for name in self._out_features}

    def _fuse(self, lateral: Tensor, coarse: Tensor) -> Tensor:
        """Join a lateral map (overwritten) with the coarser map, upsampled to its size."""
        height, width = coarse.shape[-2:]
        if lateral.shape[-2:] != (2 * height, 2 * width):
            raise ValueError(
                f"FPN: the height and width of the input must be multiples of "
                f"{self._size_divisibility}; two levels came out as {tuple(lateral.shape[-2:])} "
                f"and {(height, width)}. Pad the batch (ImageList.from_tensors does)."
            )
        if lateral.requires_grad or is_symbolic():
            lateral += F.interpolate(coarse, scale_factor=2.0, mode="nearest")
        else:
            # Add each coarse pixel to its 2x2 cell, without the upsampled map: 9 ms instead of 52
            # at p2 of 800x1216, channels last, 2 cores. (Its backward would be slower.)
            cells = lateral.unflatten(2, (height, 2)).unflatten(4, (width, 2))
            cells += coarse[:, :, :, None, :, None]
        return lateral if self._fuse_type == "sum" else lateral.div_(2)


def _conv(in_channels: int, out_channels: int, kernel: int, norm: str, stride: int = 1) -> Conv2d:
    conv = Conv2d(
        in_channels,
        out_channels,
        kernel_size=kernel,
        stride=stride,
        padding=kernel // 2,
        bias=norm == "",
        norm=get_norm(norm, out_channels),
    )
    xavier_fill(conv)
    return conv


def _check_arguments(in_features: Sequence[str], known: list[str], fuse_type: str) -> None:
    if not in_features:
        raise ValueError(f"FPN in_features (MODEL.FPN.IN_FEATURES) is empty; choose from {known}.")
    for name in in_features:
        if name not in known:
            raise ValueError(
                f"FPN in_features: the bottom-up network has no output {name!r}, it has {known} "
                f"(MODEL.RESNETS.OUT_FEATURES); nearest: {nearest_names(name, known)}."
            )
    if fuse_type not in {"sum", "avg"}:
        raise ValueError(f"FPN fuse_type must be 'sum' or 'avg', got {fuse_type!r}.")


def _assert_strides_are_log2_contiguous(strides: Sequence[int]) -> None:
    """Raise ValueError unless every stride is a power of two and twice the one before."""
    doubling = all(b == 2 * a for a, b in zip(strides[:-1], strides[1:], strict=True))
    if not doubling or any(s <= 0 or s & (s - 1) for s in strides):
        raise ValueError(f"FPN needs strides that are powers of 2 and double, got {list(strides)}.")


class LastLevelMaxPool(nn.Module):
    """Makes `p6` by taking every second pixel of `p5`."""

    def __init__(self) -> None:
        super().__init__()
        self.num_levels = 1
        self.in_feature = "p5"

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return `p6`.

        Args:
            x: `p5`, float (N, C, H, W).

        Returns:
            One tensor (N, C, ceil(H / 2), ceil(W / 2)).
        """
        return [F.max_pool2d(x, kernel_size=1, stride=2)]


class LastLevelP6P7(nn.Module):
    """Makes `p6` and `p7` by convolutions of stride 2.

    Args:
        in_channels: channels of the input.
        out_channels: channels of both levels.
        in_feature: name of the feature to start from.

    Source: Lin et al., Focal Loss for Dense Object Detection (2017), section 4, footnote 2.
    """

    def __init__(self, in_channels: int, out_channels: int, in_feature: str = "res5") -> None:
        super().__init__()
        self.in_feature, self.num_levels = in_feature, 2
        self.p6 = _conv(in_channels, out_channels, 3, norm="", stride=2)
        self.p7 = _conv(out_channels, out_channels, 3, norm="", stride=2)

    def forward(self, c5: Tensor) -> list[Tensor]:
        """Return `p6` and `p7`.

        Args:
            c5: float (N, in_channels, H, W).

        Returns:
            (N, out_channels, H / 2, W / 2) and (N, out_channels, H / 4, W / 4), rounded up.
        """
        finer = self.p6(c5)
        return [finer, self.p7(finer.relu())]


def _assemble(node: CfgNode, bottom_up: Backbone, top_block: nn.Module) -> FPN:
    """Make the pyramid that `node`, MODEL.FPN, describes."""
    return FPN(
        bottom_up=bottom_up,
        in_features=node.IN_FEATURES,
        out_channels=node.OUT_CHANNELS,
        norm=node.NORM,
        top_block=top_block,
        fuse_type=node.FUSE_TYPE,
    )


@BACKBONE_REGISTRY.register()
def build_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build a ResNet with FPN and `p6` by pooling, as Faster and Mask R-CNN use it.

    Args:
        cfg: a full config; reads `MODEL.RESNETS`, `MODEL.FPN`, `MODEL.BACKBONE.FREEZE_AT`.
        input_shape: its `channels` enter the stem.

    Returns:
        The network.
    """
    return _assemble(cfg.MODEL.FPN, build_resnet_backbone(cfg, input_shape), LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_retinanet_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build a ResNet with FPN and convolutional `p6` and `p7`, as RetinaNet uses it.

    Args:
        cfg: a full config; reads `MODEL.RESNETS`, `MODEL.FPN`, `MODEL.BACKBONE.FREEZE_AT`.
        input_shape: its `channels` enter the stem.

    Returns:
        The network.
    """
    node = cfg.MODEL.FPN
    bottom_up = build_resnet_backbone(cfg, input_shape)
    channels = {name: shape.channels or 0 for name, shape in bottom_up.output_shape().items()}
    channels["p5"] = node.OUT_CHANNELS
    if node.P6_FROM not in channels:
        raise ValueError(
            f"build_retinanet_resnet_fpn_backbone makes p6 from {node.P6_FROM} (MODEL.FPN.P6_FROM)"
            f": add '{node.P6_FROM}' to MODEL.RESNETS.OUT_FEATURES (got {list(channels)[:-1]})."
        )
    top_block = LastLevelP6P7(channels[node.P6_FROM], node.OUT_CHANNELS, node.P6_FROM)
    return _assemble(node, bottom_up, top_block)
