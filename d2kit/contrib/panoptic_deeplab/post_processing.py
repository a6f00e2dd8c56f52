"""From semantic scores, centres and offsets to segments.

Source: Cheng et al., Panoptic-DeepLab (2020), section 3.3.
"""

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "find_instance_center",
    "get_instance_segmentation",
    "get_panoptic_segmentation",
    "group_pixels",
    "merge_semantic_and_instance",
]

_PIXELS_AT_ONCE = 2**16  # distances to 200 centres in 52 MB


def find_instance_center(
    center_heatmap: Tensor, threshold: float = 0.1, nms_kernel: int = 3, top_k: int | None = None
) -> Tensor:
    """Return the peaks of the heat map of one image.

    Args:
        center_heatmap: (1, H, W) in 0..1.
        threshold: least value of a peak.
        nms_kernel: side of the window in which one peak is kept, odd, in pixels.
        top_k: at most so many of the highest; None: all.

    Returns:
        (K, 2) int64 (y, x), row by row of the image; with `top_k`, the highest.
    """
    heat = center_heatmap.reshape(1, 1, *center_heatmap.shape[-2:])
    highest = F.max_pool2d(heat, nms_kernel, stride=1, padding=(nms_kernel - 1) // 2)
    peak = (heat == highest) & (heat > threshold)
    values = heat[peak]
    places = peak[0, 0].nonzero()
    if top_k is not None and len(places) > top_k:
        places = places[values >= values.topk(top_k).values[-1]][:top_k]
    return places


def group_pixels(center_points: Tensor, offsets: Tensor) -> Tensor:
    """Give every pixel the centre nearest to where its offset leads.

    Args:
        center_points: (K, 2) (y, x), K >= 1.
        offsets: (2, H, W) (y, x) in pixels.

    Returns:
        (1, H, W) int64, from 1.
    """
    height, width = offsets.shape[1:]
    ys = torch.arange(height, device=offsets.device).view(-1, 1)
    xs = torch.arange(width, device=offsets.device).view(1, -1)
    aims = torch.stack([offsets[0] + ys, offsets[1] + xs], dim=-1).flatten(0, 1)
    centers = center_points.to(aims.dtype)
    nearest = [torch.cdist(p, centers).argmin(dim=1) for p in aims.split(_PIXELS_AT_ONCE)]
    return torch.cat(nearest).view(1, height, width) + 1


def get_instance_segmentation(
    sem_seg: Tensor,
    center_heatmap: Tensor,
    offsets: Tensor,
    thing_seg: Tensor,
    thing_ids: Collection[int],
    threshold: float = 0.1,
    nms_kernel: int = 3,
    top_k: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the instance of each pixel of a thing, and the centres.

    Args:
        sem_seg: (1, H, W) classes; not used where `thing_seg` says which pixels are things.
        center_heatmap: (1, H, W).
        offsets: (2, H, W).
        thing_seg: bool (1, H, W).
        thing_ids: classes of things; not used.
        threshold: see `find_instance_center`, as the next two.
        nms_kernel: pixels.
        top_k: count.

    Returns:
        (1, H, W) int64, 0 outside of things; centres (1, K, 2).
    """
    del thing_ids
    centers = find_instance_center(center_heatmap, threshold, nms_kernel, top_k)
    if len(centers) == 0:
        return torch.zeros_like(sem_seg), centers.unsqueeze(0)
    return thing_seg * group_pixels(centers, offsets), centers.unsqueeze(0)


def merge_semantic_and_instance(
    sem_seg: Tensor,
    ins_seg: Tensor,
    semantic_thing_seg: Tensor,
    label_divisor: int,
    thing_ids: Collection[int],
    stuff_area: int,
    void_label: int,
) -> Tensor:
    """Join classes and instances: an instance is of the class that most of its pixels have.

    Args:
        sem_seg: (1, H, W) int64 classes.
        ins_seg: (1, H, W) int64 instances, 0: none.
        semantic_thing_seg: bool (1, H, W), pixels of things.
        label_divisor: a segment's label is its class times this plus the number among its class.
        thing_ids: classes of things.
        stuff_area: stuff of fewer pixels is void.
        void_label: label of pixels without a segment.

    Returns:
        (1, H, W) int64.
    """
    merged = torch.full_like(sem_seg, void_label)
    things = (ins_seg > 0) & semantic_thing_seg
    numbers: dict[int, int] = {}
    for instance in ins_seg[things].unique().tolist():
        mask = things & (ins_seg == instance)
        label = int(sem_seg[mask].mode().values)
        numbers[label] = numbers.get(label, 0) + 1
        merged[mask] = label * label_divisor + numbers[label]
    for label in sem_seg.unique().tolist():
        mask = (sem_seg == label) & ~things
        if label not in thing_ids and int(mask.sum()) >= stuff_area:
            merged[mask] = label * label_divisor
    return merged


def get_panoptic_segmentation(
    sem_seg: Tensor,
    center_heatmap: Tensor,
    offsets: Tensor,
    thing_ids: Collection[int],
    label_divisor: int,
    stuff_area: int,
    void_label: int,
    threshold: float = 0.1,
    nms_kernel: int = 7,
    top_k: int = 200,
    foreground_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the segments of one image.

    Args:
        sem_seg: (1, H, W) int64 classes.
        center_heatmap: (1, H, W) in 0..1.
        offsets: (2, H, W) (y, x) in pixels.
        thing_ids: classes of things.
        label_divisor: see `merge_semantic_and_instance`, as the next two.
        stuff_area: pixels.
        void_label: for example -1.
        threshold: see `find_instance_center`, as the next two.
        nms_kernel: pixels.
        top_k: count.
        foreground_mask: bool (1, H, W), which pixels are things; None: those whose class is one.

    Returns:
        (1, H, W) int64 labels, and the centres (1, K, 2).

    Raises:
        ValueError: an input of another shape.
    """
    for name, tensor, channels in (
        ("sem_seg", sem_seg, 1),
        ("center_heatmap", center_heatmap, 1),
        ("offsets", offsets, 2),
    ):
        if tensor.dim() != 3 or tensor.shape[0] != channels:
            raise ValueError(f"{name}: expected ({channels}, H, W), got {tuple(tensor.shape)}")
    things = foreground_mask
    if things is None:
        things = torch.isin(sem_seg, torch.tensor(sorted(thing_ids), device=sem_seg.device))
    instances, centers = get_instance_segmentation(
        sem_seg, center_heatmap, offsets, things, thing_ids, threshold, nms_kernel, top_k
    )
    merged = merge_semantic_and_instance(
        sem_seg, instances, things.bool(), label_divisor, thing_ids, stuff_area, void_label
    )
    return merged, centers
