"""Upright (4 numbers) and rotated (5 numbers) boxes by the same code."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from d2kit.layers import batched_nms, batched_nms_rotated
from d2kit.structures import Boxes, RotatedBoxes, pairwise_iou, pairwise_iou_rotated


def boxes_of(rows: Tensor) -> Boxes:
    """Wrap boxes (R, 4) XYXY or (R, 5) XYWHA."""
    return RotatedBoxes(rows) if rows.shape[-1] == 5 else Boxes(rows)


def overlaps(boxes1: Boxes, boxes2: Boxes) -> Tensor:
    """Return the IoU of each pair of boxes of one kind, (R1, R2)."""
    if isinstance(boxes1, RotatedBoxes) and isinstance(boxes2, RotatedBoxes):
        return pairwise_iou_rotated(boxes1, boxes2)
    if isinstance(boxes1, RotatedBoxes) or isinstance(boxes2, RotatedBoxes):
        raise ValueError(
            f"cannot match {type(boxes1).__name__} with {type(boxes2).__name__}: a rotated model "
            "(MODEL.PROPOSAL_GENERATOR.NAME RRPN, MODEL.ROI_HEADS.NAME RROIHeads) needs rotated "
            "ground truth (XYWHA), other models upright ones"
        )
    return pairwise_iou(boxes1, boxes2)


def suppress_by_group(boxes: Tensor, scores: Tensor, groups: Tensor, iou: float) -> Tensor:
    """Return the survivors of `batched_nms` or, for five numbers, `batched_nms_rotated`."""
    nms = batched_nms_rotated if boxes.shape[-1] == 5 else batched_nms
    return nms(boxes, scores, groups, iou)


def clip_to_images(boxes: Tensor, image_sizes: Sequence[tuple[int, int]]) -> Tensor:
    """Clip the boxes of each image to it; rotated ones only where they are nearly upright.

    Args:
        boxes: (N, P, 4) XYXY or (N, P, 5) XYWHA, pixels.
        image_sizes: (height, width) of the N images.

    Returns:
        The same shape.
    """
    if boxes.shape[-1] == 4:
        limits = boxes.new_tensor([(w, h, w, h) for h, w in image_sizes]).unsqueeze(1)
        return torch.minimum(boxes.clamp(min=0), limits)
    clipped = []
    for rows, size in zip(boxes, image_sizes, strict=True):
        wrapped = RotatedBoxes(rows)
        wrapped.clip(size)
        clipped.append(wrapped.tensor)
    return torch.stack(clipped)


def sides_of(boxes: Tensor) -> Tensor:
    """Return widths and heights (..., 2) of boxes (..., 4) XYXY or (..., 5) XYWHA."""
    return boxes[..., 2:4] - boxes[..., :2] if boxes.shape[-1] == 4 else boxes[..., 2:4]


def outlines_of(boxes: Tensor) -> Tensor:
    """Return upright boxes (R, 4) as they are, rotated ones (R, 5) as four corners (R, 8)."""
    if boxes.shape[-1] == 4:
        return boxes
    angle = boxes[:, 4] * (math.pi / 180)
    along = torch.stack([angle.cos(), -angle.sin()], dim=1) * boxes[:, 2:3] / 2
    down = torch.stack([angle.sin(), angle.cos()], dim=1) * boxes[:, 3:4] / 2
    centre = boxes[:, :2]
    corners = (centre - along - down, centre + along - down, centre + along + down)
    return torch.cat([*corners, centre - along + down], dim=1)
