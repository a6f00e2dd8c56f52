"""The ResNet of DeepLab: a deep stem, dilated stages, a multi-grid in the last one."""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from d2kit.config import CfgNode
from d2kit.layers import CNNBlockBase, ShapeSpec
from d2kit.modeling.backbone import BACKBONE_REGISTRY, ResNet
from d2kit.modeling.backbone.resnet import (
    FIRST_BOTTLENECK_DEPTH,
    BasicStem,
    check_out_features,
    conv_norm,
    set_norm_eps,
    stage_arguments,
)

__all__ = ["DeepLabStem", "build_resnet_deeplab_backbone"]


class DeepLabStem(CNNBlockBase):
    """Three 3x3 convolutions, the first of stride 2, and a 3x3 max pooling of stride 2.

    Args:
        in_channels: channels of the image.
        out_channels: channels of the output, even; the first two convolutions have half of them.
        norm: name of a normalisation, as `d2kit.layers.get_norm` takes it.

    Source: He et al., Bag of Tricks (2019), section 4.2, ResNet-C.
    """

    def __init__(self, in_channels: int = 3, out_channels: int = 128, norm: str = "BN") -> None:
        super().__init__(in_channels, out_channels, 4)
        half = out_channels // 2
        self.conv1 = conv_norm(in_channels, half, 3, norm, stride=2)
        self.conv2 = conv_norm(half, half, 3, norm)
        self.conv3 = conv_norm(half, out_channels, 3, norm)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of an image batch.

        Args:
            x: float (N, in_channels, H, W).

        Returns:
            Float (N, out_channels, H / 4, W / 4).
        """
        for conv in (self.conv1, self.conv2, self.conv3):
            x = F.relu_(conv(x))
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)


_STEMS: dict[str, type[BasicStem] | type[DeepLabStem]] = {
    "basic": BasicStem,
    "deeplab": DeepLabStem,
}
_DILATIONS = ((1, 1), (1, 2), (2, 4))  # of res4 and res5: strides 32, 16, 8


def _check(node: CfgNode) -> None:
    """Raise where `node`, MODEL.RESNETS, asks for what this network cannot be."""
    if node.DEPTH < FIRST_BOTTLENECK_DEPTH:
        raise ValueError(
            "build_resnet_deeplab_backbone needs MODEL.RESNETS.DEPTH 50, 101 or 152 (blocks with a "
            f"bottleneck), got {node.DEPTH}"
        )
    dilations = node.RES4_DILATION, node.RES5_DILATION
    if dilations not in _DILATIONS:
        raise ValueError(
            "MODEL.RESNETS.RES4_DILATION and RES5_DILATION must be one of the pairs "
            f"{list(_DILATIONS)}, got {dilations}"
        )
    if node.STEM_TYPE not in _STEMS:
        raise ValueError(
            f"MODEL.RESNETS.STEM_TYPE must be one of {list(_STEMS)}, got {node.STEM_TYPE!r}"
        )
    if len(node.RES5_MULTI_GRID) != 3:
        raise ValueError(
            "MODEL.RESNETS.RES5_MULTI_GRID must have one factor for each of res5's 3 blocks, got "
            f"{list(node.RES5_MULTI_GRID)}"
        )
    check_out_features(node.OUT_FEATURES, ["stem", "res2", "res3", "res4", "res5"])


def _dilated(node: CfgNode, index: int) -> dict[str, Any]:
    """Return the arguments of stage `res{index + 2}`: where it is dilated, it has no stride."""
    arguments = stage_arguments(node, index)
    dilation = {2: node.RES4_DILATION, 3: node.RES5_DILATION}.get(index, 1)
    count = arguments["num_blocks"]
    del arguments["dilation"]
    first_stride = 1 if index == 0 or dilation > 1 else 2
    grid = node.RES5_MULTI_GRID if index == 3 else [1] * count
    return {
        **arguments,
        "stride_per_block": [first_stride] + [1] * (count - 1),
        "dilation_per_block": [dilation * factor for factor in grid],
    }


@BACKBONE_REGISTRY.register()
def build_resnet_deeplab_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """Build the dilated ResNet that `cfg.MODEL.RESNETS` describes.

    Args:
        cfg: a full config with the keys of `add_deeplab_config`.
        input_shape: its `channels` enter the stem.

    Returns:
        The network, with only the stages that `OUT_FEATURES` needs.

    Raises:
        ValueError: a key of `MODEL.RESNETS` has a value that this network cannot have.

    Source: Chen et al., Rethinking Atrous Convolution (2017), section 3.2 (dilation, multi-grid).
    """
    node = cfg.MODEL.RESNETS
    _check(node)
    stem = _STEMS[node.STEM_TYPE](input_shape.channels or 3, node.STEM_OUT_CHANNELS, node.NORM)
    in_channels, out_channels = node.STEM_OUT_CHANNELS, node.RES2_OUT_CHANNELS
    stages = []
    for index in range(4):
        stages.append(
            ResNet.make_stage(
                in_channels=in_channels, out_channels=out_channels, **_dilated(node, index)
            )
        )
        in_channels, out_channels = out_channels, 2 * out_channels
    network = ResNet(
        stem, stages, out_features=node.OUT_FEATURES, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT
    )
    set_norm_eps(network, node.NORM_EPS)
    return network
