"""Builders of the transformers, RegNet and timm's networks under a pyramid, from config keys.

timm is installed by ``pip install d2kit[timm]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from d2kit.config import CfgNode
from d2kit.layers import ShapeSpec
from d2kit.modeling.backbone.backbone import BACKBONE_REGISTRY, Backbone
from d2kit.modeling.backbone.fpn import FPN, LastLevelMaxPool, LastLevelP6P7
from d2kit.modeling.backbone.mvit import MViT
from d2kit.modeling.backbone.regnet import RegNet, ResBottleneckBlock, SimpleStem
from d2kit.modeling.backbone.swin import SwinTransformer
from d2kit.modeling.backbone.vit import SimpleFeaturePyramid, ViT
from d2kit.utils.registry import nearest_names

__all__ = [
    "TimmBackbone",
    "build_mvit_fpn_backbone",
    "build_regnet_fpn_backbone",
    "build_swin_fpn_backbone",
    "build_timm_fpn_backbone",
    "build_vit_sfp_backbone",
]


_PROBE = 128  # side of the image that tells which weights a feature depends on, in pixels


class TimmBackbone(Backbone):
    """Feature maps of a network of timm, called `res2` (stride 4), `res3` (stride 8) and so on.

    Maps whose size is not that of the image over the stride (networks without padding, such as
    Inception) are extended or cut at all sides, so that every level looks at the same place.

    Args:
        name: of the model, as `timm.list_models` has it.
        pretrained: download its weights.
        out_indices: which of its maps; empty for those of strides 4 to 32.
        in_channels: channels of the images.
        freeze_at: 0 trains all; k does not train what the maps of stride up to 2**k depend on (for
            a ResNet: 1 the stem, 2 the stem and `res2`, ...). Norms there keep their statistics.
        norm_eps: number added to variances in BatchNorm; 0 for the model's own.
        fix_norm_statistics: BatchNorm keeps the statistics that were loaded, also in training; its
            weights and biases are trained. timm's layers stay: they hold the activation.

    Raises:
        ImportError: timm is not installed.
        ValueError: an unknown model, or one without such maps.
    """

    def __init__(
        self,
        name: str,
        *,
        pretrained: bool = False,
        out_indices: Sequence[int] = (),
        in_channels: int = 3,
        freeze_at: int = 0,
        norm_eps: float = 0.0,
        fix_norm_statistics: bool = False,
    ) -> None:
        super().__init__()
        arguments = {"pretrained": pretrained, "in_chans": in_channels}
        every = _create(name, arguments)
        strides = list(every.feature_info.reduction())
        chosen = list(out_indices) or [
            i for i, stride in enumerate(strides) if stride in (4, 8, 16, 32)
        ]
        used = [strides[i] for i in chosen if -len(strides) <= i < len(strides)]
        powers = [s for s in used if isinstance(s, int) and s > 0 and s & (s - 1) == 0]
        if not chosen or len(powers) < len(chosen) or len(set(used)) < len(used):
            raise ValueError(
                f"MODEL.TIMM: a pyramid needs maps of different strides that are powers of 2, but "
                f"{name!r} has strides {strides} and MODEL.TIMM.OUT_INDICES {list(out_indices)} "
                f"takes {used}; choose other indices or another model (for a plain ViT: "
                "MODEL.BACKBONE.NAME build_vit_sfp_backbone)"
            )
        chosen = sorted(range(len(strides))[i] for i in chosen)
        channels = every.feature_info.channels()
        self.features = every
        if len(chosen) < len(strides):
            self.features = _create(name, {**arguments, "out_indices": chosen})
        self._out_features = [f"res{strides[i].bit_length() - 1}" for i in chosen]
        self._out_feature_channels = {
            key: channels[i] for key, i in zip(self._out_features, chosen, strict=True)
        }
        self._out_feature_strides = {
            key: strides[i] for key, i in zip(self._out_features, chosen, strict=True)
        }
        self._frozen: list[nn.Module] = []
        norms = [m for m in self.features.modules() if isinstance(m, _BatchNorm)]
        for norm in norms:
            norm.eps = norm_eps or norm.eps
        if fix_norm_statistics:
            self._frozen += norms
        still = [i for i, stride in enumerate(strides) if stride <= 2**freeze_at]
        if freeze_at > 0 and still:
            self._freeze(_weights_of(every, still, in_channels))
        self.train()

    def _freeze(self, used: set[str]) -> None:
        """Freeze the modules all of whose own weights are among those named."""
        for name, module in self.features.named_modules():
            own = dict(module.named_parameters(recurse=False))
            below = [f"{name}.{key}".lstrip(".") for key in own]
            if own and set(below) <= used:
                module.requires_grad_(False)
                self._frozen.append(module)

    def train(self, mode: bool = True) -> TimmBackbone:
        """Set the mode of all but the frozen parts, which stay in inference mode."""
        super().train(mode)
        for module in self._frozen:
            module.train(False)
        return self

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the feature maps of an image batch.

        Args:
            x: float (N, in_channels, H, W).

        Returns:
            Name to (N, C_f, H / stride, W / stride), rounded up.
        """
        if x.device.type == "cpu" and x.dtype == torch.float32:
            # Depthwise layers take a fifth less time so; what follows keeps the order.
            x = x.contiguous(memory_format=torch.channels_last)
        maps = {}
        for name, feature in zip(self._out_features, self.features(x), strict=True):
            stride, channels = self._out_feature_strides[name], self._out_feature_channels[name]
            if feature.shape[1] != channels and feature.shape[-1] == channels:
                feature = feature.permute(0, 3, 1, 2).contiguous()  # noqa: PLW2901
            size = (-(-x.shape[2] // stride), -(-x.shape[3] // stride))
            maps[name] = _centred(feature, size)
        return maps


def _weights_of(net: nn.Module, maps: list[int], in_channels: int) -> set[str]:
    """Return the names of the weights that some maps of a network depend on: the graph tells."""
    names, weights = zip(*net.named_parameters(), strict=True)
    features = net.eval()(torch.zeros(1, in_channels, _PROBE, _PROBE))
    total = torch.stack([features[i].sum() for i in maps]).sum()
    gradients = torch.autograd.grad(total, weights, allow_unused=True)
    return {n for n, gradient in zip(names, gradients, strict=True) if gradient is not None}


def _centred(feature: Tensor, size: tuple[int, int]) -> Tensor:
    """Give a map (N, C, H, W) another size: repeat its border outwards, or cut, at all sides."""
    more_h, more_w = size[0] - feature.shape[2], size[1] - feature.shape[3]
    if more_h == more_w == 0:
        return feature
    left, top = more_w // 2, more_h // 2
    sides = (left, more_w - left, top, more_h - top)
    return F.pad(feature, sides, mode="replicate")


def _create(name: str, arguments: dict[str, Any]) -> Any:
    """Make a network of timm that returns maps."""
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            "MODEL.BACKBONE.NAME build_timm_fpn_backbone needs the package timm: "
            "pip install d2kit[timm]"
        ) from error
    on_a_hub = ":" in name  # hf_hub:owner/model, local-dir:path
    if not on_a_hub and not timm.is_model(name.split(".", maxsplit=1)[0]):
        near = nearest_names(name, timm.list_models())
        raise ValueError(f"MODEL.TIMM.NAME: timm has no model {name!r}; nearest: {near}")
    try:  # those made for one size of images are told that there will be others
        return timm.create_model(name, features_only=True, strict_img_size=False, **arguments)
    except TypeError:
        return timm.create_model(name, features_only=True, **arguments)


_NORM = partial(nn.LayerNorm, eps=1e-6)  # of the published ViT and MViT


def _top_block(node: CfgNode, last_level: str) -> nn.Module | None:
    """Make what adds coarser levels above `last_level`, as `node`, MODEL.FPN, names it."""
    if node.TOP_BLOCK == "pool":
        block = LastLevelMaxPool()
        block.in_feature = last_level
        return block
    if node.TOP_BLOCK == "conv":
        return LastLevelP6P7(node.OUT_CHANNELS, node.OUT_CHANNELS, last_level)
    if node.TOP_BLOCK in ("", "none", None):
        return None
    raise ValueError(f"MODEL.FPN.TOP_BLOCK must be pool, conv or none, got {node.TOP_BLOCK!r}.")


def _pyramid(node: CfgNode, bottom_up: Backbone) -> FPN:
    """Put the pyramid that `node`, MODEL.FPN, describes over a network."""
    shapes = bottom_up.output_shape()
    names = list(node.IN_FEATURES) or list(shapes)
    last = shapes[names[-1]].stride if names[-1] in shapes else None
    return FPN(
        bottom_up=bottom_up,
        in_features=names,
        out_channels=node.OUT_CHANNELS,
        norm=node.NORM,
        top_block=_top_block(node, f"p{(last or 1).bit_length() - 1}"),
        fuse_type=node.FUSE_TYPE,
    )


@BACKBONE_REGISTRY.register()
def build_regnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build a RegNet with FPN.

    Args:
        cfg: a full config; reads `MODEL.REGNET`, `MODEL.FPN`, `MODEL.BACKBONE.FREEZE_AT`.
        input_shape: its `channels` enter the stem.

    Returns:
        The network; maps `s1` to `s4` feed the pyramid.
    """
    node = cfg.MODEL.REGNET
    bottom_up = RegNet(
        stem_class=SimpleStem,
        stem_width=node.STEM_WIDTH,
        block_class=ResBottleneckBlock,
        depth=node.DEPTH,
        w_a=node.W_A,
        w_0=node.W_0,
        w_m=node.W_M,
        group_width=node.GROUP_WIDTH,
        se_ratio=node.SE_RATIO,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        norm=node.NORM,
        out_features=list(cfg.MODEL.FPN.IN_FEATURES) or ["s1", "s2", "s3", "s4"],
        in_channels=input_shape.channels or 3,
    )
    return _pyramid(cfg.MODEL.FPN, bottom_up)


@BACKBONE_REGISTRY.register()
def build_swin_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build a Swin transformer with FPN.

    Args:
        cfg: a full config; reads `MODEL.SWIN`, `MODEL.FPN` and `MODEL.BACKBONE.FREEZE_AT` (1 the
            patches, 2 also the first stage, ...).
        input_shape: its `channels` enter the patches.

    Returns:
        The network; maps `p0` to `p3` (strides 4 to 32) feed the pyramid's `p2` to `p5`.
    """
    node = cfg.MODEL.SWIN
    bottom_up = SwinTransformer(
        in_chans=input_shape.channels or 3,
        embed_dim=node.EMBED_DIM,
        depths=node.DEPTHS,
        num_heads=node.NUM_HEADS,
        window_size=node.WINDOW_SIZE,
        drop_path_rate=node.DROP_PATH_RATE,
        out_indices=range(len(node.DEPTHS)),
        frozen_stages=cfg.MODEL.BACKBONE.FREEZE_AT or -1,
        use_checkpoint=node.USE_CHECKPOINT,
    )
    return _pyramid(cfg.MODEL.FPN, bottom_up)


@BACKBONE_REGISTRY.register()
def build_mvit_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build an MViTv2 with FPN.

    Args:
        cfg: a full config; reads `MODEL.MVIT`, `MODEL.FPN` and `MODEL.BACKBONE.FREEZE_AT` (1 the
            patches, 2 also the first stage, ...).
        input_shape: its `channels` enter the patches.

    Returns:
        The network; maps `scale2` to `scale5` feed the pyramid.
    """
    node = cfg.MODEL.MVIT
    bottom_up = MViT(
        img_size=node.IMG_SIZE,
        in_chans=input_shape.channels or 3,
        embed_dim=node.EMBED_DIM,
        depth=node.DEPTH,
        num_heads=node.NUM_HEADS,
        last_block_indexes=node.LAST_BLOCKS,
        adaptive_window_size=node.WINDOW_SIZE,
        drop_path_rate=node.DROP_PATH_RATE,
        norm_layer=_NORM,
        use_act_checkpoint=node.USE_CHECKPOINT,
        out_features=[f"scale{i + 2}" for i in range(len(node.LAST_BLOCKS))],
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )
    return _pyramid(cfg.MODEL.FPN, bottom_up)


@BACKBONE_REGISTRY.register()
def build_vit_sfp_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> SimpleFeaturePyramid:
    """Build a plain ViT with a simple feature pyramid of strides 4 to 32 (for patches of 16).

    Args:
        cfg: a full config; reads `MODEL.VIT`, `MODEL.FPN.OUT_CHANNELS`, `.NORM` (empty for LN, as
            published) and `.TOP_BLOCK`, and `MODEL.BACKBONE.FREEZE_AT` (1 patches and positions,
            2 also the first block, ...).
        input_shape: its `channels` enter the patches.

    Returns:
        The network.
    """
    node, fpn = cfg.MODEL.VIT, cfg.MODEL.FPN
    net = ViT(
        img_size=node.IMG_SIZE,
        patch_size=node.PATCH_SIZE,
        in_chans=input_shape.channels or 3,
        embed_dim=node.EMBED_DIM,
        depth=node.DEPTH,
        num_heads=node.NUM_HEADS,
        drop_path_rate=node.DROP_PATH_RATE,
        norm_layer=_NORM,
        use_rel_pos=node.USE_REL_POS,
        window_size=node.WINDOW_SIZE,
        window_block_indexes=[i for i in range(node.DEPTH) if i not in node.GLOBAL_BLOCKS],
        use_act_checkpoint=node.USE_CHECKPOINT,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )
    return SimpleFeaturePyramid(
        net,
        in_feature="last_feat",
        out_channels=fpn.OUT_CHANNELS,
        scale_factors=(4.0, 2.0, 1.0, 0.5),
        top_block=_top_block(fpn, f"p{(2 * node.PATCH_SIZE).bit_length() - 1}"),
        norm=fpn.NORM or "LN",
        square_pad=node.SQUARE_PAD,
    )


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build a network of timm with FPN.

    Args:
        cfg: a full config; reads `MODEL.TIMM`, `MODEL.FPN` and `MODEL.BACKBONE.FREEZE_AT`, see
            `TimmBackbone`.
        input_shape: its `channels` enter the network.

    Returns:
        The network; maps `res2` (stride 4) to `res5` (stride 32) feed the pyramid.
    """
    node = cfg.MODEL.TIMM
    bottom_up = TimmBackbone(
        node.NAME,
        pretrained=node.PRETRAINED,
        out_indices=node.OUT_INDICES,
        in_channels=input_shape.channels or 3,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        norm_eps=node.NORM_EPS,
        fix_norm_statistics=node.FIX_NORM_STATISTICS,
    )
    return _pyramid(cfg.MODEL.FPN, bottom_up)
