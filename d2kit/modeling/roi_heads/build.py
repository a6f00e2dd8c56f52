"""Assembles the branches of the per-region heads from the config."""

from collections.abc import Callable
from typing import Any

from torch import nn

from d2kit.config import CfgNode
from d2kit.layers import ShapeSpec
from d2kit.layers.wrappers import shapes_of
from d2kit.modeling.backbone.resnet import BottleneckBlock, ResNet
from d2kit.modeling.box_regression import Box2BoxTransform, Matcher
from d2kit.modeling.poolers import ROIPooler
from d2kit.modeling.roi_heads.box_head import build_box_head
from d2kit.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from d2kit.modeling.roi_heads.keypoint_head import build_keypoint_head
from d2kit.modeling.roi_heads.mask_head import build_mask_head

_KEY = "MODEL.ROI_HEADS.IN_FEATURES"


def build_pooler(
    cfg: CfgNode, node: CfgNode, input_shape: dict[str, ShapeSpec]
) -> tuple[list[str], ROIPooler, ShapeSpec]:
    """Build the pooler of one branch.

    Args:
        cfg: the config.
        node: the branch's own, with the `POOLER_*` keys.
        input_shape: feature name -> its shape.

    Returns:
        The names of its levels, the pooler, and the shape of one pooled region.

    Raises:
        ValueError: if a level does not exist or the levels differ in channels.
    """
    names = list(cfg.MODEL.ROI_HEADS.IN_FEATURES)
    shapes = shapes_of(names, input_shape, _KEY)
    channels = {shape.channels for shape in shapes}
    if len(channels) != 1:
        raise ValueError(
            f"the levels of {_KEY} {names} must have the same channels, "
            f"got {[shape.channels for shape in shapes]}"
        )
    side = node.POOLER_RESOLUTION
    pooler = ROIPooler(
        output_size=side,
        scales=tuple(1.0 / _stride(*level) for level in zip(names, shapes, strict=True)),
        sampling_ratio=node.POOLER_SAMPLING_RATIO,
        pooler_type=node.POOLER_TYPE,
    )
    return names, pooler, ShapeSpec(channels=channels.pop(), height=side, width=side)


def _stride(name: str, shape: ShapeSpec) -> int:
    if shape.stride is None:
        raise ValueError(f"the backbone must state the stride of '{name}', got {shape}")
    return shape.stride


def build_box_branch(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
    """Build what `StandardROIHeads` needs for boxes: its `box_*` arguments."""
    names, pooler, shape = build_pooler(cfg, cfg.MODEL.ROI_BOX_HEAD, input_shape)
    head = build_box_head(cfg, shape)
    return {
        "box_in_features": names,
        "box_pooler": pooler,
        "box_head": head,
        "box_predictor": FastRCNNOutputLayers(cfg, head.output_shape),
    }


def build_cascade_branch(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
    """Build what `CascadeROIHeads` needs for boxes: its `box_*` arguments and the matchers.

    Raises:
        ValueError: if the config describes no cascade.
    """
    node = cfg.MODEL.ROI_BOX_CASCADE_HEAD
    weights, ious = list(node.BBOX_REG_WEIGHTS), list(node.IOUS)
    if len(weights) != len(ious):
        raise ValueError(
            "MODEL.ROI_BOX_CASCADE_HEAD needs one entry per stage in BBOX_REG_WEIGHTS and in IOUS, "
            f"got {len(weights)} and {len(ious)}"
        )
    if not cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG:
        raise ValueError(
            "CascadeROIHeads refines one box per region: set "
            "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG True"
        )
    first = cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS
    if list(first) != ious[:1]:
        raise ValueError(
            "the first of MODEL.ROI_BOX_CASCADE_HEAD.IOUS must be MODEL.ROI_HEADS.IOU_THRESHOLDS, "
            f"got {ious} and {list(first)}"
        )
    names, pooler, shape = build_pooler(cfg, cfg.MODEL.ROI_BOX_HEAD, input_shape)
    heads = [build_box_head(cfg, shape) for _ in ious]
    return {
        "box_in_features": names,
        "box_pooler": pooler,
        "box_heads": heads,
        "box_predictors": [
            FastRCNNOutputLayers(
                cfg, head.output_shape, box2box_transform=Box2BoxTransform(weights=weight)
            )
            for head, weight in zip(heads, weights, strict=True)
        ],
        "proposal_matchers": [Matcher([iou], [0, 1]) for iou in ious],
    }


def build_mask_branch(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
    """Build what `StandardROIHeads` needs for masks: its `mask_*` arguments, or none."""
    if not cfg.MODEL.MASK_ON:
        return {}
    return _build_branch("mask", build_mask_head, cfg, cfg.MODEL.ROI_MASK_HEAD, input_shape)


def build_keypoint_branch(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
    """Build what `StandardROIHeads` needs for keypoints: its `keypoint_*` arguments, or none."""
    if not cfg.MODEL.KEYPOINT_ON:
        return {}
    node = cfg.MODEL.ROI_KEYPOINT_HEAD
    return _build_branch("keypoint", build_keypoint_head, cfg, node, input_shape)


def _build_branch(
    task: str,
    build_head: Callable[[CfgNode, Any], nn.Module],
    cfg: CfgNode,
    node: CfgNode,
    input_shape: dict[str, ShapeSpec],
) -> dict[str, Any]:
    """Build the pooler (none for an empty `POOLER_TYPE`: the head pools by itself) and the head."""
    if node.POOLER_TYPE:
        names, pooler, shape = build_pooler(cfg, node, input_shape)
        head = build_head(cfg, shape)
    else:
        names, pooler = list(cfg.MODEL.ROI_HEADS.IN_FEATURES), None
        shapes = dict(zip(names, shapes_of(names, input_shape, _KEY), strict=True))
        head = build_head(cfg, shapes)
    return {f"{task}_in_features": names, f"{task}_pooler": pooler, f"{task}_head": head}


def build_res5_stage(cfg: CfgNode) -> tuple[nn.Sequential, int]:
    """Build the last stage of a ResNet as a per-region head.

    Args:
        cfg: the config; `MODEL.RESNETS` describes the stage.

    Returns:
        The stage, of stride 2, and its output channels.

    Raises:
        ValueError: if the stage should have deformable convolutions.

    Source: Faster R-CNN on ResNet (He et al. 2016), appendix A.
    """
    node = cfg.MODEL.RESNETS
    if node.DEFORM_ON_PER_STAGE[-1]:
        raise ValueError(
            "MODEL.RESNETS.DEFORM_ON_PER_STAGE: Res5ROIHeads has no deformable convolutions in "
            f"its res5, got {list(node.DEFORM_ON_PER_STAGE)}; set the last to False"
        )
    widening = 2**3  # res5 over res2
    out_channels = node.RES2_OUT_CHANNELS * widening
    blocks = ResNet.make_stage(
        BottleneckBlock,
        3,
        stride_per_block=[2, 1, 1],
        in_channels=out_channels // 2,
        bottleneck_channels=node.NUM_GROUPS * node.WIDTH_PER_GROUP * widening,
        out_channels=out_channels,
        num_groups=node.NUM_GROUPS,
        norm=node.NORM,
        stride_in_1x1=node.STRIDE_IN_1X1,
    )
    return nn.Sequential(*blocks), out_channels
