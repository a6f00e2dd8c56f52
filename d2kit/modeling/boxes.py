"""Upright (4 numbers) and rotated (5 numbers) boxes by the same code."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from d2kit.layers import batched_nms, batched_nms_rotated
from d2kit.modeling.matcher import Matcher
from d2kit.structures import Boxes, RotatedBoxes, pairwise_iou, pairwise_iou_rotated
from d2kit.utils.devices import upload
from d2kit.utils.tracing import is_symbolic


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
    if boxes.shape[-1] == 4 and is_symbolic():
        inside = []
        for rows, size in zip(boxes.unbind(), image_sizes, strict=True):
            of_image = Boxes(rows)
            of_image.clip(size)
            inside.append(of_image.tensor)
        return torch.stack(inside)
    if boxes.shape[-1] == 4:
        limits = torch.tensor([(w, h, w, h) for h, w in image_sizes], dtype=boxes.dtype)
        return torch.minimum(boxes.clamp(min=0), upload(limits, boxes.device).unsqueeze(1))
    clipped = []
    for rows, size in zip(boxes, image_sizes, strict=True):
        wrapped = RotatedBoxes(rows)
        wrapped.clip(size)
        clipped.append(wrapped.tensor)
    return torch.stack(clipped)


def split_like(rows: Tensor, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Split `rows` (R, ...) of all images into those of each, as many as its part (R_i, ...)."""
    # `len` would make the numbers of one image constants of a trace
    return (rows,) if len(parts) == 1 else rows.split([part.shape[0] for part in parts])


def true_rows(mask: Tensor, count: int) -> Tensor:
    """Return where a mask (R,) is true, ascending, given how often that is; without a wait."""
    return mask.argsort(descending=True, stable=True)[:count]


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


_MAX_PAIRS = 2**26
"""Largest IoU matrix held at once: 256 MiB in float32, or 250 ground truths at 800x1333."""


def match_boxes(
    matcher: Matcher, gt_boxes: Boxes, boxes: Boxes, max_pairs: int = _MAX_PAIRS
) -> tuple[Tensor, Tensor]:
    """Match `boxes` to `gt_boxes` by IoU, in parts where the whole matrix would be too large.

    Args:
        matcher: thresholds and labels.
        gt_boxes: G boxes.
        boxes: A boxes, rotated where these are.
        max_pairs: largest part of the (G, A) matrix to hold.

    Returns:
        Per box: index of the best ground truth (A,) int64, and its label (A,) int8.
    """
    rows = max(1, max_pairs // max(1, len(boxes)))
    if len(gt_boxes) <= rows:
        return matcher(overlaps(gt_boxes, boxes))
    best = torch.full((len(boxes),), -1.0, device=boxes.device)
    index = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
    favourite = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    for start in range(0, len(gt_boxes), rows):
        iou = overlaps(gt_boxes[start : start + rows], boxes)
        value, row = iou.max(dim=0)
        better = value > best
        best = torch.where(better, value, best)
        index = torch.where(better, row + start, index)
        row_best = iou.amax(dim=1, keepdim=True)
        favourite |= ((iou == row_best) & (row_best > 0)).any(dim=0)
    by_threshold = copy.copy(matcher)
    by_threshold.allow_low_quality_matches = False
    labels = by_threshold(best.unsqueeze(0))[1]
    if matcher.allow_low_quality_matches:
        labels = labels.masked_fill(favourite, 1)
    return index, labels


def rows_or_zeros(values: Tensor, index: Tensor) -> Tensor:
    """Return `values` (G, ...) at the matches `index` (A,); zeros where G is 0."""
    if len(values) == 0:
        return values.new_zeros((len(index), *values.shape[1:]))
    return values[index]


def check_classes(gt_classes: Tensor, num_classes: int, where: str = "") -> None:
    """Make sure that ground truths have classes of the model.

    On CUDA the device itself looks, and stops the program at its next wait; on other devices
    nothing is checked. So check before the upload.

    Args:
        gt_classes: (G,) integers.
        num_classes: K.
        where: which image it is, for the message.

    Raises:
        ValueError: if a class is not in [0, K).
    """
    if gt_classes.is_cuda:
        known = ((gt_classes >= 0) & (gt_classes < num_classes)).all()
        torch._assert_async(known, f"a ground-truth class is not in 0..{num_classes - 1}")
    if len(gt_classes) == 0 or gt_classes.device.type != "cpu":
        return
    low, high = torch.stack(torch.aminmax(gt_classes)).tolist()
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"{f'{where}: ' if where else ''}ground-truth classes must be in 0..{num_classes - 1} "
            f"(NUM_CLASSES {num_classes} of the model's heads), got {low}..{high}"
        )


def matched_classes(gt_classes: Tensor, index: Tensor, label: Tensor, background: int) -> Tensor:
    """Return the class that each box is to be given.

    Args:
        gt_classes: (G,) int64.
        index: (A,) the match of each box, see `match_boxes`.
        label: (A,) its label, or whether it is positive.
        background: class of the boxes labelled 0, and of all where there is no ground truth.

    Returns:
        (A,) int64; -1 for boxes labelled -1.
    """
    if len(gt_classes) == 0:
        return torch.full_like(index, background)
    return gt_classes[index].masked_fill(label == 0, background).masked_fill(label == -1, -1)
