"""Losses between boxes and on scores, by their names in detection papers."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision import ops

__all__ = ["ciou_loss", "diou_loss", "giou_loss", "sigmoid_focal_loss", "smooth_l1_loss"]


def _reduce(loss: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if reduction == "mean":
        return loss.mean() if loss.numel() else loss.sum()  # no element: 0, not NaN
    raise ValueError(f"expected reduction 'none', 'mean' or 'sum', got '{reduction}'")


def giou_loss(boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7) -> Tensor:
    """Return 1 - generalised IoU of box i of the first and box i of the second.

    Args:
        boxes1: (R, 4) XYXY, x0 <= x1 and y0 <= y1.
        boxes2: (R, 4), likewise.
        reduction: "none", "mean" or "sum".
        eps: added to denominators.

    Returns:
        (R,) in [0, 2], or a scalar.

    Source: Rezatofighi et al., Generalized Intersection over Union (2019).
    """
    overlap, union = _overlap_and_union(boxes1, boxes2)
    width, height = _hull(boxes1, boxes2).unbind(-1)
    hull = width * height
    return _reduce(1 - overlap / (union + eps) + (hull - union) / (hull + eps), reduction)


def diou_loss(boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7) -> Tensor:
    """Return 1 - IoU + squared distance of centres over squared diagonal of the hull.

    Args:
        boxes1: (R, 4) XYXY, x0 <= x1 and y0 <= y1.
        boxes2: (R, 4), likewise.
        reduction: "none", "mean" or "sum".
        eps: added to denominators.

    Returns:
        (R,) in [0, 2], or a scalar.

    Source: Zheng et al., Distance-IoU Loss (2020), equation 7.
    """
    overlap, union = _overlap_and_union(boxes1, boxes2)
    return _reduce(1 - overlap / (union + eps) + _distance(boxes1, boxes2, eps), reduction)


def ciou_loss(boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7) -> Tensor:
    """Return the distance-IoU loss plus a term for the difference of aspect ratios.

    Args:
        boxes1: (R, 4) XYXY, x0 < x1 and y0 < y1.
        boxes2: (R, 4), likewise.
        reduction: "none", "mean" or "sum".
        eps: added to denominators.

    Returns:
        (R,), or a scalar.

    Source: Zheng et al., Distance-IoU Loss (2020), equation 10.
    """
    overlap, union = _overlap_and_union(boxes1, boxes2)
    iou = overlap / (union + eps)
    angles = []
    for boxes in (boxes1, boxes2):
        width, height = (boxes[..., 2:] - boxes[..., :2]).unbind(-1)
        angles.append(torch.atan(width / height))
    ratio = 4 / math.pi**2 * (angles[1] - angles[0]).square()
    with torch.no_grad():
        trade_off = ratio / (1 - iou + ratio + eps)
    return _reduce(1 - iou + _distance(boxes1, boxes2, eps) + trade_off * ratio, reduction)


# torchvision has these losses too, but selects the pairs that overlap: each step would wait for the
# device to know how many they are.


def _overlap_and_union(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor]:
    """Return the areas (R,) of intersection and union of box i and box i."""
    low = torch.maximum(boxes1[..., :2], boxes2[..., :2])
    width, height = F.relu(torch.minimum(boxes1[..., 2:], boxes2[..., 2:]) - low).unbind(-1)
    overlap = width * height
    sides = ((boxes[..., 2:] - boxes[..., :2]).unbind(-1) for boxes in (boxes1, boxes2))
    return overlap, sum(w * h for w, h in sides) - overlap


def _hull(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Return the sides (R, 2) of the smallest box around box i and box i."""
    low = torch.minimum(boxes1[..., :2], boxes2[..., :2])
    return torch.maximum(boxes1[..., 2:], boxes2[..., 2:]) - low


def _distance(boxes1: Tensor, boxes2: Tensor, eps: float) -> Tensor:
    """Return the squared distance (R,) of centres over the squared diagonal of the hull."""
    offset = (boxes1[..., :2] + boxes1[..., 2:] - boxes2[..., :2] - boxes2[..., 2:]) / 2
    diagonal = _hull(boxes1, boxes2).square().sum(-1)
    return offset.square().sum(-1) / (diagonal + eps)


def smooth_l1_loss(input: Tensor, target: Tensor, beta: float, reduction: str = "none") -> Tensor:
    """Return the smooth L1 loss: quadratic below `beta`, linear above.

    Args:
        input: any shape.
        target: the same shape.
        beta: where the pieces meet; 0 gives the L1 loss.
        reduction: "none", "mean" or "sum".

    Returns:
        The shape of `input`, or a scalar.

    Raises:
        ValueError: if the shapes differ.

    Source: Girshick, Fast R-CNN (2015), equation 3.
    """
    if input.shape != target.shape:
        raise ValueError(
            f"smooth_l1_loss: expected equal shapes, got {tuple(input.shape)} and "
            f"{tuple(target.shape)}"
        )
    if beta < 1e-5:  # below, the quadratic piece is noise and its derivative is not finite
        return _reduce(torch.abs(input - target), reduction)
    return _reduce(F.smooth_l1_loss(input, target, reduction="none", beta=beta), reduction)


def sigmoid_focal_loss(
    inputs: Tensor, targets: Tensor, alpha: float = -1, gamma: float = 2, reduction: str = "none"
) -> Tensor:
    """Return the focal loss of logits.

    Args:
        inputs: any shape, logits.
        targets: the same shape, 0 or 1.
        alpha: weight of positives in [0, 1]; negative means no weighting.
        gamma: exponent of the probability that the target is missed.
        reduction: "none", "mean" or "sum".

    Returns:
        The shape of `inputs`, or a scalar.

    Source: Lin et al., Focal Loss for Dense Object Detection (2017), equations 4 and 5.
    """
    return _reduce(ops.sigmoid_focal_loss(inputs, targets, alpha, gamma, "none"), reduction)
