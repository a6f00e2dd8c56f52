"""Choosing points in regions, and the features of feature maps at points.

Points of a region are (x, y) in [0, 1] of its box; bilinear sampling takes pixels as squares, so
that the centre of the first of W columns lies at 0.5 / W.

Source: PointRend (Kirillov et al. 2020), section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from d2kit.modeling.sampling import generator_for
from d2kit.structures import Boxes


def point_sample(input: Tensor, point_coords: Tensor, **kwargs: Any) -> Tensor:
    """Sample maps bilinearly at points.

    Args:
        input: (N, C, H, W).
        point_coords: (N, P, 2) or (N, Hg, Wg, 2), x and y in [0, 1] of the map; outside is 0.
        **kwargs: of `torch.nn.functional.grid_sample`; ``align_corners`` is False by default.

    Returns:
        (N, C, P) or (N, C, Hg, Wg).
    """
    flat = point_coords.dim() == 3
    grid = 2 * (point_coords.unsqueeze(2) if flat else point_coords) - 1
    if grid.numel() == 0:  # grid_sample wants at least one point
        return input.new_zeros(*input.shape[:2], *point_coords.shape[1:-1]) + 0 * input.sum()
    kwargs.setdefault("align_corners", False)
    sampled = F.grid_sample(input, grid.to(input.dtype), **kwargs)
    return sampled.squeeze(3) if flat else sampled


def generate_regular_grid_point_coords(R: int, side_size: int, device: Any) -> Tensor:
    """Return the centres of the cells of a square grid over each region.

    Args:
        R: number of regions.
        side_size: S cells per side.
        device: of the result.

    Returns:
        (R, S * S, 2), row by row.
    """
    ticks = (torch.arange(side_size, device=device) + 0.5) / side_size
    grid = torch.cartesian_prod(ticks, ticks).flip(1)
    return grid.expand(R, -1, -1)


def uniform_points(
    regions: int, points: int, device: Any, regions_per_image: Sequence[int] | None, stage: str
) -> Tensor:
    """Draw points (R, P, 2) in [0, 1].

    Args:
        regions: R.
        points: P.
        device: of the result.
        regions_per_image: how the R regions are spread over the images of the batch; then each
            image draws from its own generator, see `d2kit.modeling.sampling`. None: torch's.
        stage: names the choice.
    """
    if regions_per_image is None:
        return torch.rand(regions, points, 2, device=device)
    return torch.cat(
        [
            torch.rand(count, points, 2, device=device, generator=generator_for(i, stage, device))
            for i, count in enumerate(regions_per_image)
        ]
    )


@torch.no_grad()
def get_uncertain_point_coords_with_randomness(
    coarse_logits: Tensor,
    uncertainty_func: Callable[[Tensor], Tensor],
    num_points: int,
    oversample_ratio: float,
    importance_sample_ratio: float,
    *,
    regions_per_image: Sequence[int] | None = None,
) -> Tensor:
    """Choose points to train on: the most uncertain of many, and some more by chance.

    Args:
        coarse_logits: (R, C, H, W), the prediction to be refined.
        uncertainty_func: maps logits at points (R, C, P) to uncertainties (R, 1, P).
        num_points: P.
        oversample_ratio: k, at least 1: the uncertain ones are chosen among k * P.
        importance_sample_ratio: share of P, in [0, 1], that is chosen for being uncertain.
        regions_per_image: see `uniform_points`.

    Returns:
        (R, P, 2).

    Raises:
        ValueError: a ratio outside its range.

    Source: PointRend, section 3.1, "Training".
    """
    if oversample_ratio < 1 or not 0 <= importance_sample_ratio <= 1:
        raise ValueError(
            "points to train on: oversample_ratio must be at least 1 and importance_sample_ratio "
            f"in [0, 1], got {oversample_ratio} and {importance_sample_ratio}"
        )
    regions, device = len(coarse_logits), coarse_logits.device
    many = int(num_points * oversample_ratio)
    candidates = uniform_points(regions, many, device, regions_per_image, "point_candidates")
    uncertain = int(num_points * importance_sample_ratio)
    uncertainty = uncertainty_func(point_sample(coarse_logits, candidates)).reshape(regions, many)
    best = uncertainty.topk(uncertain, dim=1).indices
    chosen = candidates.gather(1, best.unsqueeze(2).expand(-1, -1, 2))
    others = uniform_points(
        regions, num_points - uncertain, device, regions_per_image, "point_others"
    )
    return torch.cat([chosen, others], dim=1)


def get_uncertain_point_coords_on_grid(
    uncertainty_map: Tensor, num_points: int
) -> tuple[Tensor, Tensor]:
    """Choose the most uncertain cells of each map.

    Args:
        uncertainty_map: (R, 1, H, W).
        num_points: how many; all cells where there are fewer.

    Returns:
        Indices y * W + x (R, P) int64, and the cells' centres (R, P, 2).

    Source: PointRend, section 3.1, "Inference".
    """
    regions, _, height, width = uncertainty_map.shape
    points = min(num_points, height * width)
    index = uncertainty_map.reshape(regions, height * width).topk(points, dim=1).indices
    x = (index % width + 0.5) / width
    y = (index.div(width, rounding_mode="floor") + 0.5) / height
    return index, torch.stack([x, y], dim=2).to(uncertainty_map.dtype)


def get_point_coords_wrt_image(boxes_coords: Tensor, point_coords: Tensor) -> Tensor:
    """Convert points of boxes to pixels.

    Args:
        boxes_coords: (R, 4) XYXY, absolute pixels.
        point_coords: (R, P, 2) in [0, 1] of the boxes.

    Returns:
        (R, P, 2), absolute pixels.
    """
    start, end = boxes_coords[:, None, :2], boxes_coords[:, None, 2:]
    return start + point_coords * (end - start)


def point_sample_fine_grained_features(
    features_list: Sequence[Tensor],
    feature_scales: Sequence[float],
    boxes: Sequence[Boxes],
    point_coords: Tensor,
) -> tuple[Tensor, Tensor]:
    """Sample feature maps at points of boxes; the channels of all maps are joined.

    Args:
        features_list: L maps (N, C_l, H_l, W_l).
        feature_scales: for each map 1 / stride.
        boxes: per image, XYXY in absolute pixels; R in all.
        point_coords: (R, P, 2) in [0, 1] of the boxes.

    Returns:
        Features (R, sum of C_l, P), and the points in absolute pixels (R, P, 2).
    """
    places = get_point_coords_wrt_image(torch.cat([b.tensor for b in boxes]), point_coords)
    by_image = places.split([len(b) for b in boxes])
    joined = []
    for features, scale in zip(features_list, feature_scales, strict=True):
        height, width = features.shape[-2:]
        size = places.new_tensor([width / scale, height / scale])
        sampled = [
            point_sample(features[i : i + 1], (points / size).unsqueeze(0))
            for i, points in enumerate(by_image)
        ]
        joined.append(torch.cat([s.squeeze(0).transpose(0, 1) for s in sampled]))
    return torch.cat(joined, dim=1), places


def sample_bitmaps(bitmaps: Tensor, index: Tensor, points: Tensor) -> Tensor:
    """Sample bitmaps bilinearly, each shared by any number of regions.

    Args:
        bitmaps: (G, H, W) bool.
        index: (R,) int64, the bitmap of each region.
        points: (R, P, 2) x and y in pixels; the centre of the first pixel is (0.5, 0.5).

    Returns:
        (R, P) float32 in [0, 1]; outside of the image is 0.
    """
    height, width = bitmaps.shape[-2:]
    corner = (points - 0.5).floor()
    weight = points - 0.5 - corner
    corner = corner.long()
    total = points.new_zeros(points.shape[:2], dtype=torch.float32)
    for dx in (0, 1):
        for dy in (0, 1):
            x, y = corner[..., 0] + dx, corner[..., 1] + dy
            inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
            value = bitmaps[index[:, None], y.clamp(0, height - 1), x.clamp(0, width - 1)]
            share = (weight[..., 0] - (1 - dx)).abs() * (weight[..., 1] - (1 - dy)).abs()
            total += share * (value & inside)
    return total
