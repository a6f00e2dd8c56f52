"""Builders of the transformers, RegNet and timm's networks under a pyramid, from the config."""

from functools import partial

from torch import nn

from d2kit.config import CfgNode
from d2kit.layers import ShapeSpec
from d2kit.modeling.backbone.backbone import Backbone
from d2kit.modeling.backbone.build import BACKBONE_REGISTRY
from d2kit.modeling.backbone.fpn import FPN, LastLevelMaxPool, LastLevelP6P7
from d2kit.modeling.backbone.mvit import MViT
from d2kit.modeling.backbone.regnet import RegNet, ResBottleneckBlock, SimpleStem
from d2kit.modeling.backbone.swin import SwinTransformer
from d2kit.modeling.backbone.timm_fpn import TimmBackbone
from d2kit.modeling.backbone.vit import SimpleFeaturePyramid, ViT

__all__ = [
    "build_mvit_fpn_backbone",
    "build_regnet_fpn_backbone",
    "build_swin_fpn_backbone",
    "build_timm_fpn_backbone",
    "build_vit_sfp_backbone",
]

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
