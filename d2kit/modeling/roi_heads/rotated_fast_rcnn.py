"""Box heads for rotated boxes.

Source: Ma et al., Arbitrary-Oriented Scene Text Detection via Rotation Proposals (2018), section
III-E; Girshick, Fast R-CNN (2015), section 2.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from d2kit.config import CfgNode, configurable
from d2kit.layers import ShapeSpec
from d2kit.modeling.box_regression import Box2BoxTransformRotated
from d2kit.modeling.proposal_generator.proposal_utils import (
    fast_rcnn_inference,
    fast_rcnn_inference_single_image,
)
from d2kit.modeling.proposal_generator.rpn import check_rotated_loss, rotated_weights
from d2kit.modeling.roi_heads.box_head import build_box_head
from d2kit.modeling.roi_heads.build import build_pooler
from d2kit.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from d2kit.modeling.roi_heads.roi_heads import ROI_HEADS_REGISTRY, StandardROIHeads
from d2kit.structures import Instances

__all__ = [
    "RROIHeads",
    "RotatedFastRCNNOutputLayers",
    "fast_rcnn_inference_rotated",
    "fast_rcnn_inference_single_image_rotated",
]


def fast_rcnn_inference_rotated(
    boxes: Sequence[Tensor],
    scores: Sequence[Tensor],
    image_shapes: Sequence[tuple[int, int]],
    score_thresh: float,
    nms_thresh: float,
    topk_per_image: int,
) -> tuple[list[Instances], list[Tensor]]:
    """Turn the decoded rotated boxes and scores of each image into detections.

    Args:
        boxes: per image (R, K*5), or (R, 5) where boxes do not depend on the class; XYWHA in
            pixels and degrees.
        scores: per image (R, K+1), probabilities, background last.
        image_shapes: (height, width) per image.
        score_thresh: only scores above it count.
        nms_thresh: rotated IoU above which the weaker of two detections of one class goes.
        topk_per_image: detections kept per image.

    Returns:
        Per image: `Instances` with `pred_boxes` (`RotatedBoxes`), `scores`, `pred_classes`, best
        first; and the row of `boxes` (int64) from which each came.

    Source: Ma et al. (2018), section III-D.
    """
    return fast_rcnn_inference(
        boxes, scores, image_shapes, score_thresh, nms_thresh, topk_per_image, box_dim=5
    )


def fast_rcnn_inference_single_image_rotated(
    boxes: Tensor,
    scores: Tensor,
    image_shape: tuple[int, int],
    score_thresh: float,
    nms_thresh: float,
    topk_per_image: int,
) -> tuple[Instances, Tensor]:
    """Do what `fast_rcnn_inference_rotated` does, for one image.

    Args:
        boxes: (R, K*5) or (R, 5), XYWHA in pixels and degrees.
        scores: (R, K+1).
        image_shape: (height, width).
        score_thresh: see there, as the others.
        nms_thresh: IoU.
        topk_per_image: count.

    Returns:
        Detections, and the row of `boxes` from which each came.
    """
    return fast_rcnn_inference_single_image(
        boxes, scores, image_shape, score_thresh, nms_thresh, topk_per_image, box_dim=5
    )


class RotatedFastRCNNOutputLayers(FastRCNNOutputLayers):
    """Two linear layers, for K+1 class scores and for 5 box deltas per class.

    Args:
        input_shape: of one region's features; they are flattened.
        **kwargs: as of `FastRCNNOutputLayers`; `box2box_transform` is a `Box2BoxTransformRotated`.

    Raises:
        ValueError: a box loss that has no rotated form.

    Source: Ma et al. (2018), section III-E.
    """

    @configurable
    def __init__(self, input_shape: ShapeSpec, **kwargs: object) -> None:
        super().__init__(input_shape, **kwargs)
        check_rotated_loss(self.box_reg_loss_type, "MODEL.ROI_BOX_HEAD")

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Return the constructor's arguments for `cfg` and one region's feature shape."""
        weights = rotated_weights(cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS, "MODEL.ROI_BOX_HEAD")
        return {
            **super().from_config(cfg, input_shape),
            "box2box_transform": Box2BoxTransformRotated(weights=weights),
        }


@ROI_HEADS_REGISTRY.register()
class RROIHeads(StandardROIHeads):
    """A box head for rotated boxes, and nothing else.

    Args:
        **kwargs: as of `StandardROIHeads`, without masks, keypoints and `train_on_pred_boxes`.

    Raises:
        ValueError: if one of these is asked for.

    Source: Ma et al. (2018), section III-E; rotated pooling: `d2kit.layers.ROIAlignRotated`.
    """

    @configurable
    def __init__(self, **kwargs: object) -> None:
        super().__init__(**kwargs)
        wrong = [
            name
            for name, on in (
                ("MODEL.MASK_ON", self.mask_on),
                ("MODEL.KEYPOINT_ON", self.keypoint_on),
                ("MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES", self.train_on_pred_boxes),
            )
            if on
        ]
        if wrong:
            raise ValueError(f"RROIHeads has rotated boxes only: set {', '.join(wrong)} to False")

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Return the box branch's arguments; user classes override it."""
        return build_rotated_box_branch(cfg, input_shape)


def build_rotated_box_branch(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
    """Build what `RROIHeads` needs: its `box_*` arguments.

    Args:
        cfg: the config.
        input_shape: feature name -> its shape.

    Raises:
        ValueError: if the regions would be pooled as if they were upright.
    """
    node = cfg.MODEL.ROI_BOX_HEAD
    if node.POOLER_TYPE != "ROIAlignRotated":
        raise ValueError(
            "RROIHeads needs MODEL.ROI_BOX_HEAD.POOLER_TYPE ROIAlignRotated, got "
            f"{node.POOLER_TYPE!r}"
        )
    names, pooler, shape = build_pooler(cfg, node, input_shape)
    head = build_box_head(cfg, shape)
    return {
        "box_in_features": names,
        "box_pooler": pooler,
        "box_head": head,
        "box_predictor": RotatedFastRCNNOutputLayers(cfg, head.output_shape),
    }
