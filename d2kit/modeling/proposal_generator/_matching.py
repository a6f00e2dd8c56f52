"""Matching of many boxes to many ground truths in bounded memory."""

import copy

import torch
from torch import Tensor

from d2kit.modeling._boxes import overlaps
from d2kit.modeling.matcher import Matcher
from d2kit.structures import Boxes

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
