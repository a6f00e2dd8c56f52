"""Greedy non-maximum suppression, per class and for rotated boxes."""

import numpy as np
import torch
import torchvision
from torch import Tensor
from torchvision.ops import nms

from d2kit.layers.rotated_boxes import overlapping_pairs
from d2kit.utils.devices import is_symbolic

__all__ = ["batched_nms", "batched_nms_rotated", "keep_masks", "nms", "nms_rotated"]

_MOVED_APART_AT_ONCE = 200_000  # numbers of boxes: the matrix of overlaps takes 300 MB


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """Suppress, within each class, boxes that overlap a better one.

    Args:
        boxes: (R, 4) XYXY, absolute pixels.
        scores: (R,), the higher the better.
        idxs: (R,) integers; only boxes with the same number compete.
        iou_threshold: in [0, 1]; a box with an IoU above it with a better box is dropped.

    Returns:
        (R',) int64 indices of the boxes that stay, by falling score.

    Raises:
        ValueError: if the boxes are not (R, 4).
    """
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"batched_nms: expected boxes of shape (R, 4), got {tuple(boxes.shape)}")
    if is_symbolic() or (boxes.is_cuda and boxes.numel() <= _MOVED_APART_AT_ONCE):
        # Torchvision chooses between two ways by the number of boxes: record one that fits all. On
        # CUDA it copies a constant from the host, and for many boxes waits for each class.
        # Classes are moved apart, so that their boxes do not meet; there may be no box at all.
        boxes = boxes.float()
        flat = boxes.flatten()
        if is_symbolic() or not len(flat):
            flat = torch.cat([flat, flat.new_zeros(1)])
        span = flat.max() + 1
        moved = boxes + (idxs.to(boxes.dtype) * span)[:, None]
        recorded = torch.compiler.is_exporting()
        return (_nms_of_few if recorded else nms)(moved, scores, iou_threshold)
    found: Tensor = torchvision.ops.batched_nms(boxes.float(), scores, idxs, iou_threshold)
    return found


def _nms_of_few(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Suppress as `nms` does, recorded by torch.export, where fewer than two boxes may stay.

    Torchvision's rule for recorded sizes promises two at least: two far ones are added.
    """
    far = boxes.new_tensor([[-2e5, 0, -1e5, 1], [-2e5, 2, -1e5, 3]])
    last = scores.new_full((2,), -torch.inf)
    keep = nms(torch.cat([boxes, far]), torch.cat([scores, last]), iou_threshold)
    found: Tensor = keep[keep < boxes.shape[0]]
    return found


def keep_masks(
    boxes: Tensor,
    valid: Tensor,
    iou_threshold: float,
    groups: Tensor | None = None,
    rounds: int = 32,
) -> tuple[Tensor, Tensor]:
    """Do what `nms` does for a batch of sorted boxes, with shapes that do not depend on them.

    A box stays if no better one that stays overlaps it. Starting with all, each round gets one more
    link of every chain of overlaps right; where two rounds agree, the answer is final.

    Args:
        boxes: (B, P, 4) XYXY pixels, the best first.
        valid: (B, P) bool; others neither stay nor suppress.
        iou_threshold: in [0, 1]; a box with an IoU above it with a better box is dropped.
        groups: (B, P) integers; only boxes with the same number compete; None: all.
        rounds: how often to look.

    Returns:
        Which boxes stay, (B, P) bool; in which sets of boxes that is final, (B,) bool.
    """
    first, second = boxes[:, :, None], boxes[:, None]
    sides = torch.minimum(first[..., 2:], second[..., 2:])
    sides = (sides - torch.maximum(first[..., :2], second[..., :2])).clamp(min=0)
    shared = sides[..., 0] * sides[..., 1]
    area = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    over = shared / (area[:, :, None] + area[:, None] - shared) > iou_threshold
    if groups is not None:
        over &= groups[:, :, None] == groups[:, None]
    removes = over.triu(diagonal=1).to(boxes.dtype)  # the row removes the column
    keep = before = valid
    for _ in range(rounds):
        before = keep
        hit = torch.bmm(keep.unsqueeze(1).to(boxes.dtype), removes).squeeze(1)
        keep = valid & (hit == 0)
    return keep, (keep == before).all(dim=1)


def nms_rotated(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Suppress rotated boxes that overlap a better one.

    Args:
        boxes: (R, 5) centre x and y, width, height in pixels, angle in degrees.
        scores: (R,), the higher the better.
        iou_threshold: in [0, 1]; a box with an IoU above it with a better box is dropped.

    Returns:
        (R',) int64 indices of the boxes that stay, by falling score.
    """
    return batched_nms_rotated(
        boxes, scores, torch.zeros_like(scores, dtype=torch.int64), iou_threshold
    )


def batched_nms_rotated(
    boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float
) -> Tensor:
    """Suppress, within each class, rotated boxes that overlap a better one.

    Args:
        boxes: (R, 5) centre x and y, width, height in pixels, angle in degrees.
        scores: (R,), the higher the better.
        idxs: (R,) integers; only boxes with the same number compete.
        iou_threshold: in [0, 1]; a box with an IoU above it with a better box is dropped.

    Returns:
        (R',) int64 indices of the boxes that stay, by falling score.

    Raises:
        ValueError: if the boxes are not (R, 5).
    """
    if boxes.dim() != 2 or boxes.shape[1] != 5:
        raise ValueError(f"nms of rotated boxes: expected shape (R, 5), got {tuple(boxes.shape)}")
    with torch.no_grad():
        order = scores.argsort(descending=True, stable=True)
        pairs = overlapping_pairs(boxes[order], idxs[order], iou_threshold)
        keep = _greedy(pairs.cpu(), len(order))
        return order[keep.to(order.device)]


def _greedy(pairs: Tensor, count: int) -> Tensor:
    """Return which of `count` items stay when item i removes j for each pair (i, j), i < j."""
    keep = np.ones(count, dtype=bool)
    better, worse = pairs.numpy().T
    starts = np.flatnonzero(np.diff(better, prepend=-1))
    for first, last in zip(starts, [*starts, len(better)][1:], strict=True):
        if keep[better[first]]:
            keep[worse[first:last]] = False
    return torch.from_numpy(keep)
