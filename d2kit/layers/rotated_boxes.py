"""Overlap of rotated boxes in plain torch.

The area shared by two convex shapes is the integral of half of ``x dy - y dx`` along its outline
(Green), and that outline is made of the parts of the edges of each that lie in the other. Each edge
is clipped by the four sides of the other box (Liang and Barsky, 1984), so that no vertices need be
collected or sorted.
"""

import math

import torch
from torch import Tensor

from d2kit.utils.devices import exact_dtype

__all__ = ["matched_iou_rotated", "overlapping_pairs", "pairwise_iou_rotated"]

_PAIRS_AT_ONCE = 1 << 16  # about 100 MB of temporaries in float64
_TESTS_AT_ONCE = 1 << 24  # bool matrix of bounding boxes, 16 MB
# Outlines that coincide to this fraction of the box sizes count as one: the first box's edge is
# taken and the second's is dropped. It costs less than 1e-8 of IoU.
_TOUCH = 1e-9


def pairwise_iou_rotated(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Return intersection over union of each of R1 and each of R2 rotated boxes.

    Args:
        boxes1: (R1, 5) float, centre x and y, width, height in pixels, angle in degrees
            counter-clockwise as seen in the image.
        boxes2: (R2, 5), likewise.

    Returns:
        (R1, R2) float32 in [0, 1]; 0 for boxes without area. It has no gradient.
    """
    with torch.no_grad():
        ious = boxes1.new_zeros((len(boxes1), len(boxes2)), dtype=torch.float32)
        for rows, columns in _candidates(boxes1, boxes2):
            ious[rows, columns] = matched_iou_rotated(boxes1[rows], boxes2[columns])
        return ious


def overlapping_pairs(boxes: Tensor, groups: Tensor, iou_threshold: float) -> Tensor:
    """Return the pairs i < j of the same group whose IoU is above a threshold.

    Args:
        boxes: (R, 5) as of `pairwise_iou_rotated`.
        groups: (R,) integers.
        iou_threshold: in [0, 1].

    Returns:
        (P, 2) int64, sorted by i.
    """
    found = [torch.zeros((0, 2), dtype=torch.int64, device=boxes.device)]
    for i, j in _candidates(boxes, boxes, groups):
        above = matched_iou_rotated(boxes[i], boxes[j]) > iou_threshold
        found.append(torch.stack([i[above], j[above]], dim=1))
    return torch.cat(found)


def _bounds(boxes: Tensor) -> Tensor:
    """Return axis-aligned bounding boxes, (R, 4) XYXY, a little too large."""
    exact = boxes.to(exact_dtype(boxes.device))
    angle = exact[:, 4] * (math.pi / 180.0)
    cos, sin = angle.cos().abs(), angle.sin().abs()
    width, height = exact[:, 2].abs(), exact[:, 3].abs()
    half = torch.stack([cos * width + sin * height, sin * width + cos * height], dim=1) * 0.5001
    return torch.cat([exact[:, :2] - half, exact[:, :2] + half], dim=1)


def _candidates(
    boxes1: Tensor, boxes2: Tensor, groups: Tensor | None = None
) -> "list[tuple[Tensor, Tensor]]":
    """List index pairs whose bounding boxes meet; with `groups`, i < j of the same group only."""
    bounds1, bounds2 = _bounds(boxes1), _bounds(boxes2)
    step = max(1, _TESTS_AT_ONCE // max(1, len(boxes2)))
    found = []
    for start in range(0, len(boxes1), step):
        a = bounds1[start : start + step, None]
        meet = (a[..., 0] < bounds2[:, 2]) & (bounds2[:, 0] < a[..., 2])
        meet &= (a[..., 1] < bounds2[:, 3]) & (bounds2[:, 1] < a[..., 3])
        if groups is not None:
            meet &= groups[start : start + step, None] == groups
            meet = meet.triu_(diagonal=1 + start)
        rows, columns = meet.nonzero(as_tuple=True)
        rows += start
        found += list(zip(rows.split(_PAIRS_AT_ONCE), columns.split(_PAIRS_AT_ONCE), strict=True))
    return found


def matched_iou_rotated(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Return the IoU of box i of the first with box i of the second, (R,) float32.

    Args:
        boxes1: (R, 5) as of `pairwise_iou_rotated`.
        boxes2: (R, 5), likewise.
    """
    dtype = exact_dtype(boxes1.device)
    a, b = boxes1.to(dtype), boxes2.to(dtype)
    area_a, area_b = a[:, 2] * a[:, 3], b[:, 2] * b[:, 3]
    tolerance = _TOUCH * (a[:, 2] + a[:, 3] + b[:, 2] + b[:, 3])[:, None, None]
    a_in_b, b_in_a = _corners(a, frame=b), _corners(b, frame=a)
    # Edges of a are kept where they lie on edges of b that run the same way, and dropped where
    # they run the opposite way (boxes that touch from outside share no area).
    along_a, along_b = _edges(a_in_b), _edges(b_in_a)
    slack = torch.where(_side_values(along_a) > 0, tolerance, -tolerance)
    inside_a = _fraction_inside(a_in_b, along_a, b, slack)
    inside_b = _fraction_inside(b_in_a, along_b, a, -tolerance)
    # about the centre of a every edge of a spans a quarter of twice its area
    shared = inside_a.sum(1) * (area_a / 4)
    spans = b_in_a[..., 0] * along_b[..., 1] - b_in_a[..., 1] * along_b[..., 0]
    shared = (shared + (inside_b * spans).sum(1) / 2).clamp(min=0)
    union = area_a + area_b - shared
    iou = shared / union
    empty = (area_a < 1e-14) | (area_b < 1e-14)
    return torch.where(empty, torch.zeros_like(iou), iou).clamp(max=1).float()


def _corners(boxes: Tensor, frame: Tensor) -> Tensor:
    """Return the corners of boxes in the axes of other boxes about their centres, (R, 4, 2).

    The order is that of positive area.
    """
    angle = (boxes[:, 4] - frame[:, 4]) * (math.pi / 180.0)
    turn = frame[:, 4] * (math.pi / 180.0)
    x, y = (boxes[:, :2] - frame[:, :2]).unbind(1)
    # the width axis of a box is (cos, -sin), its height axis is (sin, cos): y points down
    centre_x = x * turn.cos() - y * turn.sin()
    centre_y = x * turn.sin() + y * turn.cos()
    signs = boxes.new_tensor([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]])
    u = boxes[:, 2:3] * signs[:, 0]
    v = boxes[:, 3:4] * signs[:, 1]
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    return torch.stack(
        [centre_x[:, None] + u * cos + v * sin, centre_y[:, None] - u * sin + v * cos], dim=2
    )


def _edges(corners: Tensor) -> Tensor:
    """Return the vectors from each corner to the next, (R, 4, 2)."""
    return corners.roll(-1, dims=1) - corners


def _side_values(vectors: Tensor) -> Tensor:
    """Return how far vectors run along the four sides of the frame's box, (R, 4, 4).

    Sides in the order of the corners: top, right, bottom, left, run through in positive sense.
    """
    x, y = vectors.unbind(2)
    return torch.stack([x, y, -x, -y], dim=2)


def _fraction_inside(corners: Tensor, edges: Tensor, frame: Tensor, slack: Tensor) -> Tensor:
    """Return the fraction of each edge that lies in the frame's box grown by `slack`, (R, 4)."""
    half_w, half_h = frame[:, 2:3] / 2, frame[:, 3:4] / 2
    x, y = corners.unbind(2)
    # signed distances of the starts from the top, right, bottom and left side, positive inside
    start = torch.stack([y + half_h, half_w - x, half_h - y, x + half_w], dim=2) + slack
    dx, dy = edges.unbind(2)
    end = start + torch.stack([dy, -dx, -dy, dx], dim=2)
    crossing = start / torch.where(start == end, 1.0, start - end)
    zero, one = torch.zeros_like(start), torch.ones_like(start)
    enter = torch.where(start >= 0, zero, torch.where(end >= 0, crossing, one)).amax(2)
    leave = torch.where(end >= 0, one, torch.where(start >= 0, crossing, zero)).amin(2)
    return (leave - enter).clamp(min=0)
