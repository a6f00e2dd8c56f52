"""Which place of the pyramid learns which box, and how central it lies there.

Source: Tian et al., FCOS (2019), sections 3.1 to 3.3.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from d2kit.structures import Boxes

_MAX_PAIRS = 2**24
"""Largest (G, A) matrix held at once; about ten of them exist at a time, 640 MiB in all."""


def smallest_box_around(
    places: Sequence[Tensor], gt_boxes: Boxes, radius: float, max_pairs: int = _MAX_PAIRS
) -> tuple[Tensor, Tensor]:
    """Find the ground truth of every place.

    A place may learn a box that it lies in, near whose centre it lies, and whose farthest side is
    4 to 8 strides away (from 0 on the finest level, to infinity on the coarsest: 0, 64, 128, 256,
    512, infinity for strides 8 to 128). Among several it takes the smallest.

    Args:
        places: per level (A_l, 4), squares around each place with the stride as their side.
        gt_boxes: G boxes.
        radius: largest distance to the centre of the box, along x and along y, in strides; 0 or
            less: any.
        max_pairs: places times ground truths looked at together.

    Returns:
        Index of the ground truth (A,) int64, 0 where there is none; bool (A,), whether there is.

    Source: section 3.2; centre sampling: Tian et al. (2020).
    """
    all_places = torch.cat(list(places))
    centers = (all_places[:, :2] + all_places[:, 2:]) / 2
    strides = all_places[:, 2] - all_places[:, 0]
    nearest, farthest = 4 * strides, 8 * strides
    nearest[: len(places[0])] = 0
    farthest[len(all_places) - len(places[-1]) :] = torch.inf
    smallest = torch.full_like(strides, torch.inf)
    index = torch.zeros_like(strides, dtype=torch.int64)
    rows = max(1, max_pairs // max(1, len(all_places)))
    areas = gt_boxes.area()
    for start in range(0, len(gt_boxes), rows):
        boxes = gt_boxes.tensor[start : start + rows, None]
        low, high = centers - boxes[..., :2], boxes[..., 2:] - centers  # (G, A, 2)
        reach = torch.maximum(low, high).amax(dim=2)
        fits = (torch.minimum(low, high).amin(dim=2) > 0) & (reach >= nearest) & (reach <= farthest)
        if radius > 0:  # the distance to the centre is half the difference of opposite sides
            fits &= (low - high).abs().amax(dim=2) < 2 * radius * strides
        area, row = torch.where(fits, areas[start : start + rows, None], torch.inf).min(dim=0)
        index = torch.where(area < smallest, row + start, index)
        smallest = torch.minimum(smallest, area)
    return index, smallest < torch.inf


def centerness(places: Tensor, boxes: Tensor) -> Tensor:
    """Return the geometric mean of the ratios of opposite distances.

    Args:
        places: (A, 4), squares around each place.
        boxes: (N, A, 4) XYXY, the box of each place.

    Returns:
        (N, A) in [0, 1]: 1 in the centre, 0 on the border and outside.

    Source: equation 3.
    """
    centers = (places[:, :2] + places[:, 2:]) / 2
    low, high = centers - boxes[..., :2], boxes[..., 2:] - centers
    shorter, longer = torch.minimum(low, high).clamp(min=0), torch.maximum(low, high)
    return (shorter / longer.clamp(min=1e-6)).prod(dim=-1).sqrt()
