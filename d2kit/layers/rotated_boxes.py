"""Rotated boxes in plain torch: their overlap, and RoIAlign of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from d2kit.layers.roi_align import Taps, parts_of, sample_counts, sum_rows
from d2kit.utils.devices import exact_dtype

__all__ = [
    "ROIAlignRotated",
    "matched_iou_rotated",
    "overlapping_pairs",
    "pairwise_iou_rotated",
    "roi_align_rotated",
]


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
) -> list[tuple[Tensor, Tensor]]:
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


def roi_align_rotated(
    input: Tensor,
    rois: Tensor,
    output_size: int | tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
) -> Tensor:
    """Pool each rotated RoI to a grid of bins by averaging bilinear samples.

    Args:
        input: (N, C, H, W) feature map.
        rois: (R, 6): index of the image, centre x and y, width, height in pixels of the image, and
            the angle in degrees counter-clockwise as seen in the image.
        output_size: P, or (height, width) of the output in bins.
        spatial_scale: pixels of the feature map per pixel of the boxes.
        sampling_ratio: samples per bin and axis; 0 or less takes one per pixel of the feature map.

    Returns:
        (R, C, height, width) of the dtype of `input`.

    Raises:
        ValueError: if the shapes are others.

    Source: Ma et al., Arbitrary-Oriented Scene Text Detection via Rotation Proposals (2018), with
    the sampling of He et al., Mask R-CNN (2017), section 3.
    """
    if input.dim() != 4 or rois.dim() != 2 or rois.shape[1] != 6:
        raise ValueError(
            "roi_align_rotated: expected a feature map (N, C, H, W) and boxes (R, 6), "
            f"got {tuple(input.shape)} and {tuple(rois.shape)}"
        )
    _, channels, height, width = input.shape
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    rows = input.permute(0, 2, 3, 1).reshape(-1, channels).to(dtype).contiguous()
    rois = rois.detach().to(dtype)
    size = _pair(output_size)
    bins = torch.tensor(size, device=rois.device)
    steps = rois[:, [4, 3]] * spatial_scale / bins  # of y, of x
    samples = sample_counts(steps, sampling_ratio)
    pooled = []
    for part in parts_of(samples.prod(dim=1) * (4 * size[0] * size[1])):
        y, x, roi, ends = _positions(rois[part], steps[part], samples[part], size, spatial_scale)
        share = 1 / samples[part].clamp(min=1).prod(dim=1).to(dtype)
        start = rois[part, 0].long() * (height * width)
        index, weight = _bilinear(y, x, (height, width))
        pooled.append(
            sum_rows(
                rows,
                Taps(
                    (index + start[roi, None]).flatten(),
                    4 * ends,
                    (weight * share[roi, None]).flatten(),
                ),
            )
        )
    out = pooled[0] if len(pooled) == 1 else torch.cat(pooled)
    return out.view(len(rois), *size, channels).permute(0, 3, 1, 2).to(input.dtype)


def _positions(
    rois: Tensor, steps: Tensor, samples: Tensor, size: tuple[int, int], spatial_scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """List all samples, bin after bin.

    Args:
        rois: (R, 6).
        steps: (R, 2) height and width of bins in pixels of the feature map.
        samples: (R, 2) samples per bin along height and width.
        size: bins along height and width.
        spatial_scale: pixels of the feature map per pixel of the boxes.

    Returns:
        y and x of S samples in pixels of the feature map, the RoI of each, and for each bin the
        number of its first sample, (R * bins,).
    """
    device = rois.device
    bins = size[0] * size[1]
    per_bin = samples.prod(dim=1).repeat_interleave(bins)
    first = per_bin.cumsum(0) - per_bin
    bag = torch.repeat_interleave(torch.arange(len(per_bin), device=device), per_bin)
    roi = bag.div(bins, rounding_mode="floor")
    bin_y = (bag % bins).div(size[1], rounding_mode="floor")
    bin_x = bag % size[1]
    number = torch.arange(len(bag), device=device) - first[bag]
    count_y, count_x = samples[roi].unbind(1)
    step_y, step_x = steps[roi].unbind(1)
    sample_y = number.div(count_x, rounding_mode="floor") + 0.5
    sample_x = number % count_x + 0.5
    # in the axes of the box, about its centre
    down = (bin_y - size[0] / 2 + sample_y / count_y) * step_y
    right = (bin_x - size[1] / 2 + sample_x / count_x) * step_x
    angle = rois[:, 5] * (math.pi / 180.0)
    cos, sin = angle.cos()[roi], angle.sin()[roi]
    centre = rois[:, 1:3] * spatial_scale - 0.5
    y = down * cos - right * sin + centre[roi, 1]
    x = down * sin + right * cos + centre[roi, 0]
    return y, x, roi, first


def _bilinear(y: Tensor, x: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return the four pixels (S, 4) int64 around S positions and their weights (S, 4).

    A position more than a pixel outside weighs 0, one less than that takes the border.
    """
    height, width = size
    used = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    y = y.nan_to_num(0, 0, 0).clamp(0, height - 1)
    x = x.nan_to_num(0, 0, 0).clamp(0, width - 1)
    top, left = y.floor().long(), x.floor().long()
    bottom, right = (top + 1).clamp(max=height - 1), (left + 1).clamp(max=width - 1)
    fy, fx = y - top, x - left
    index = torch.stack(
        [top * width + left, top * width + right, bottom * width + left, bottom * width + right], 1
    )
    weight = torch.stack([(1 - fy) * (1 - fx), (1 - fy) * fx, fy * (1 - fx), fy * fx], dim=1)
    return index, weight * used[:, None]


class ROIAlignRotated(nn.Module):
    """RoIAlign of rotated boxes as a module; pixel centres lie at half-integer coordinates.

    Args:
        output_size: P, or (height, width) of the output in bins.
        spatial_scale: pixels of the feature map per pixel of the boxes.
        sampling_ratio: samples per bin and axis; 0 takes one per pixel of the feature map.
    """

    def __init__(
        self, output_size: int | tuple[int, int], spatial_scale: float, sampling_ratio: int
    ) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """Pool each RoI.

        Args:
            input: (N, C, H, W) feature map.
            rois: (R, 6): index of the image, then centre x and y, width, height, angle in degrees.

        Returns:
            (R, C, P, P).
        """
        return roi_align_rotated(
            input, rois, self.output_size, self.spatial_scale, self.sampling_ratio
        )

    def extra_repr(self) -> str:
        """List the settings."""
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}"
        )
