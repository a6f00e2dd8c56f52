"""DeepLabV3+: its ResNet, its loss and its head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2kit.config import CfgNode, configurable
from d2kit.layers import ASPP, CNNBlockBase, Conv2d, DepthwiseSeparableConv2d, ShapeSpec, get_norm
from d2kit.layers.blocks import normal_fill, xavier_fill
from d2kit.layers.wrappers import region_shape, shapes_of
from d2kit.modeling import SEM_SEG_HEADS_REGISTRY
from d2kit.modeling.backbone import BACKBONE_REGISTRY, ResNet
from d2kit.modeling.backbone.resnet import (
    FIRST_BOTTLENECK_DEPTH,
    BasicStem,
    check_out_features,
    conv_norm,
    set_norm_eps,
    stage_arguments,
)
from d2kit.utils import comm

__all__ = [
    "DeepLabCE",
    "DeepLabStem",
    "DeepLabV3PlusHead",
    "build_resnet_deeplab_backbone",
]


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


class DeepLabCE(nn.Module):
    """Mean cross entropy of the share of a batch's pixels whose cross entropy is largest.

    Args:
        ignore_label: label of pixels whose loss is 0; they count among all pixels.
        top_k_percent_pixels: the share of all pixels, in (0, 1]; 1 takes all.
        weight: (K,) factors of the classes.

    Raises:
        ValueError: a share that is not in (0, 1].

    Source: Yang et al., DeeperLab (2019), the weighted bootstrapped cross entropy.
    """

    def __init__(
        self,
        ignore_label: int = -1,
        top_k_percent_pixels: float = 1.0,
        weight: Tensor | None = None,
    ) -> None:
        super().__init__()
        if not 0.0 < top_k_percent_pixels <= 1.0:
            raise ValueError(
                "DeepLabCE: top_k_percent_pixels is a share of the pixels (the config key "
                f"LOSS_TOP_K): expected a number in (0, 1], got {top_k_percent_pixels}"
            )
        self.ignore_label = ignore_label
        self.top_k_percent_pixels = top_k_percent_pixels
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the loss, 0-dim float32.

        Args:
            logits: (N, K, H, W).
            labels: int64 (N, H, W).
            weights: (N, H, W), factors of the pixels' losses, which are chosen after it.
        """
        losses = F.cross_entropy(
            logits.float(),
            labels,
            weight=self.weight,  # type: ignore[arg-type]
            ignore_index=self.ignore_label,
            reduction="none",
        )
        if weights is not None:
            losses = losses * weights
        losses = losses.flatten()
        if self.top_k_percent_pixels < 1.0:
            count = max(1, int(self.top_k_percent_pixels * losses.numel()))
            losses = losses.topk(count, sorted=False).values
        return losses.mean()


Norm = str | Callable[[int], nn.Module] | None

_TOP_K = 0.2  # share of the pixels that hard pixel mining takes
_LOSS_TYPES = ("cross_entropy", "hard_pixel_mining")


@SEM_SEG_HEADS_REGISTRY.register()
class DeepLabV3PlusHead(nn.Module):
    """Pool the coarsest level by dilated convolutions, refine it by the finer levels, classify.

    Args:
        input_shape: feature name -> its shape; all are used, the coarsest one by the pooling.
        project_channels: channels that each other level is reduced to, finest first.
        aspp_dilations: three dilations, in pixels of the coarsest level.
        aspp_dropout: probability of zeroing an output of the pooling in training.
        decoder_channels: channels after each level, finest first; the last of the pooling.
        common_stride: of the finest level, in pixels.
        norm: after each convolution, as `d2kit.layers.get_norm` takes it.
        train_size: (height, width) of the training crops, over which the pooling averages; None
            averages over whole images.
        loss_weight: factor of the loss.
        loss_type: "cross_entropy" or "hard_pixel_mining" (the hardest 20 % of the pixels).
        ignore_value: label of pixels without loss.
        num_classes: K; None makes a decoder without classifier, called as `layers`.
        use_depthwise_separable_conv: in the pooling and the decoder.

    Raises:
        ValueError: settings that do not fit each other.

    Source: Chen et al., Encoder-Decoder with Atrous Separable Convolution (2018), section 3.1.
    """

    not_deterministic_on_cuda = "cross_entropy of maps (nll_loss2d)"

    @configurable
    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        project_channels: Sequence[int],
        aspp_dilations: Sequence[int],
        aspp_dropout: float,
        decoder_channels: Sequence[int],
        common_stride: int,
        norm: Norm,
        train_size: Sequence[int] | None,
        loss_weight: float = 1.0,
        loss_type: str = "cross_entropy",
        ignore_value: int = -1,
        num_classes: int | None = None,
        use_depthwise_separable_conv: bool = False,
    ) -> None:
        super().__init__()
        levels = sorted(input_shape.items(), key=lambda item: item[1].stride or 0)
        _check_levels(levels, project_channels, decoder_channels, common_stride)
        if loss_type not in _LOSS_TYPES:
            raise ValueError(
                f"MODEL.SEM_SEG_HEAD.LOSS_TYPE must be one of {_LOSS_TYPES}, got {loss_type!r}"
            )
        self.in_features = [name for name, _ in levels]
        self.common_stride = common_stride
        self.loss_weight = loss_weight
        self.ignore_value = ignore_value
        self.num_classes = num_classes
        self.decoder_only = num_classes is None
        self.loss_type = loss_type
        self.use_depthwise_separable_conv = use_depthwise_separable_conv
        self.loss: nn.Module = nn.CrossEntropyLoss(reduction="mean", ignore_index=ignore_value)
        if loss_type == "hard_pixel_mining":
            self.loss = DeepLabCE(ignore_value, _TOP_K)
        self.decoder = nn.ModuleDict()
        for i, (name, shape) in enumerate(levels[:-1]):
            channels, _, _ = region_shape(shape, name)
            fused = project_channels[i] + decoder_channels[i + 1]
            fuse = _separable_fusion if use_depthwise_separable_conv else _fusion
            stage = nn.ModuleDict()
            stage["project_conv"] = _conv(channels, project_channels[i], 1, norm)
            stage["fuse_conv"] = fuse(fused, decoder_channels[i], norm)
            self.decoder[name] = stage
        last, shape = levels[-1]
        pooling = ASPP(
            region_shape(shape, last)[0],
            decoder_channels[-1],
            aspp_dilations,
            norm=norm or "",
            activation=F.relu,
            pool_kernel_size=_pool_size(train_size, shape.stride or 1),
            dropout=aspp_dropout,
            use_depthwise_separable_conv=use_depthwise_separable_conv,
        )
        self.decoder[last] = nn.ModuleDict({"project_conv": pooling})
        if num_classes is not None:
            self.predictor = Conv2d(decoder_channels[0], num_classes, kernel_size=1)
            normal_fill(self.predictor, std=0.001)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Return the constructor's arguments for `cfg` and the backbone's output shapes.

        Raises:
            ValueError: keys are missing, or the crops of training differ in size.
        """
        node = cfg.MODEL.SEM_SEG_HEAD
        if "ASPP_CHANNELS" not in node:
            raise ValueError(
                "DeepLabV3PlusHead needs keys that this config lacks: call "
                "d2kit.contrib.deeplab.add_deeplab_config(cfg) before the file is merged"
            )
        crop = cfg.INPUT.CROP
        if crop.ENABLED and crop.TYPE != "absolute":
            raise ValueError(
                "DeepLabV3PlusHead pools over the size of the crops: INPUT.CROP.TYPE must be "
                f"'absolute', got {crop.TYPE!r}"
            )
        return {
            **cls.decoder_arguments("SEM_SEG_HEAD", node, crop, input_shape),
            "loss_weight": node.LOSS_WEIGHT,
            "loss_type": node.LOSS_TYPE,
            "ignore_value": node.IGNORE_VALUE,
            "num_classes": node.NUM_CLASSES,
            "use_depthwise_separable_conv": node.USE_DEPTHWISE_SEPARABLE_CONV,
        }

    @staticmethod
    def decoder_arguments(
        section: str, node: CfgNode, crop: CfgNode, input_shape: dict[str, ShapeSpec]
    ) -> dict[str, Any]:
        """Return the arguments of the decoder, which heads of other outputs have too.

        Args:
            section: name of `node` in MODEL, for messages.
            node: config of the head.
            crop: INPUT.CROP.
            input_shape: of the backbone's outputs.
        """
        names = list(node.IN_FEATURES)
        shapes = shapes_of(names, input_shape, f"MODEL.{section}.IN_FEATURES")
        return {
            "input_shape": dict(zip(names, shapes, strict=True)),
            "project_channels": node.PROJECT_CHANNELS,
            "aspp_dilations": node.ASPP_DILATIONS,
            "aspp_dropout": node.ASPP_DROPOUT,
            "decoder_channels": [node.CONVS_DIM] * (len(names) - 1) + [node.ASPP_CHANNELS],
            "common_stride": node.COMMON_STRIDE,
            "norm": node.NORM,
            "train_size": crop.SIZE if crop.ENABLED else None,
        }

    def forward(self, features: dict[str, Tensor], targets: Tensor | None = None) -> Any:
        """Compute the losses in training mode, or the scores of every pixel.

        Args:
            features: name -> (N, C, Hi, Wi).
            targets: int64 (N, H, W), in training.

        Returns:
            In training None and the losses; else logits (N, K, H, W) and an empty dict. Without
            classifier what `layers` returns.

        Raises:
            ValueError: in training without `targets`.
        """
        scores = self.layers(features)
        if self.decoder_only:
            return scores
        if not self.training:
            return self._upsampled(scores), {}
        if targets is None:
            raise ValueError("DeepLabV3PlusHead needs targets in training mode, got None")
        return None, self.losses(scores, targets)

    def layers(self, features: dict[str, Tensor]) -> Tensor:
        """Return logits (N, K, H, W) of the finest level's size; without classifier, features.

        Args:
            features: name -> (N, C, Hi, Wi).
        """
        *finer, last = self.in_features
        x = self._stage(last)["project_conv"](features[last])
        for name in reversed(finer):
            stage = self._stage(name)
            detail = stage["project_conv"](features[name])
            x = F.interpolate(x, size=detail.shape[-2:], mode="bilinear", align_corners=False)
            x = stage["fuse_conv"](torch.cat([detail, x], dim=1))
        found: Tensor = x if self.decoder_only else self.predictor(x)
        return found

    def losses(self, predictions: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return ``loss_sem_seg``.

        Args:
            predictions: logits (N, K, H / common_stride, W / common_stride).
            targets: int64 (N, H, W).

        Returns:
            The mean over labelled pixels, or over the hardest of all; 0 where all are ignored.
        """
        height, width = targets.shape[-2:]
        # a level of an image of odd size covers more than the image
        scores = self._upsampled(predictions.float())[..., :height, :width]
        if not isinstance(self.loss, nn.CrossEntropyLoss):
            return {"loss_sem_seg": self.loss(scores, targets) * self.loss_weight}
        total = F.cross_entropy(scores, targets, reduction="sum", ignore_index=self.ignore_value)
        count = comm.mean_over_ranks((targets != self.ignore_value).sum()).clamp(min=1)
        return {"loss_sem_seg": total / count * self.loss_weight}

    def _stage(self, name: str) -> Any:
        return self.decoder[name]

    def _upsampled(self, scores: Tensor) -> Tensor:
        """Return the logits at the size of the image."""
        factor = float(self.common_stride)
        return F.interpolate(scores, scale_factor=factor, mode="bilinear", align_corners=False)


def _check_levels(
    levels: list[tuple[str, ShapeSpec]],
    project_channels: Sequence[int],
    decoder_channels: Sequence[int],
    common_stride: int,
) -> None:
    """Raise where the settings of the levels do not fit each other."""
    if not levels:
        raise ValueError("DeepLabV3PlusHead needs at least one feature (SEM_SEG_HEAD.IN_FEATURES)")
    names = [name for name, _ in levels]
    if len(project_channels) != len(levels) - 1 or len(decoder_channels) != len(levels):
        raise ValueError(
            f"DeepLabV3PlusHead with the features {names} needs {len(levels) - 1} numbers in "
            f"MODEL.SEM_SEG_HEAD.PROJECT_CHANNELS and {len(levels)} in decoder_channels, got "
            f"{list(project_channels)} and {list(decoder_channels)}"
        )
    if levels[0][1].stride != common_stride:
        raise ValueError(
            f"feature '{names[0]}', the finest of MODEL.SEM_SEG_HEAD.IN_FEATURES, has stride "
            f"{levels[0][1].stride}; it must be COMMON_STRIDE, {common_stride}"
        )


def _pool_size(train_size: Sequence[int] | None, stride: int) -> tuple[int, int] | None:
    """Return (height, width) of the training crops in pixels of the coarsest level."""
    if train_size is None:
        return None
    height, width = train_size
    if height % stride or width % stride:
        raise ValueError(
            f"INPUT.CROP.SIZE must be multiples of {stride}, the stride of the coarsest feature of "
            f"DeepLabV3PlusHead, got {(height, width)}"
        )
    return height // stride, width // stride


def _conv(in_channels: int, out_channels: int, kernel: int, norm: Norm) -> Conv2d:
    """A convolution that keeps the size, its normalisation, and ReLU."""
    conv = Conv2d(
        in_channels,
        out_channels,
        kernel_size=kernel,
        padding=kernel // 2,
        bias=not norm,
        norm=get_norm(norm, out_channels),
        activation=F.relu,
    )
    xavier_fill(conv)
    return conv


def _fusion(in_channels: int, out_channels: int, norm: Norm) -> nn.Module:
    first = _conv(in_channels, out_channels, 3, norm)
    return nn.Sequential(first, _conv(out_channels, out_channels, 3, norm))


def _separable_fusion(in_channels: int, out_channels: int, norm: Norm) -> nn.Module:
    """One 5x5 convolution, which sees as far as two of 3x3."""
    return DepthwiseSeparableConv2d(
        in_channels,
        out_channels,
        kernel_size=5,
        padding=2,
        norm1=norm,
        activation1=F.relu,
        norm2=norm,
        activation2=F.relu,
    )
