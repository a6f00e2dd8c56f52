"""What a loss looks at: the choice of anchors and proposals, and the targets of the chosen.

The choice for an image is a function of that image's seed, not of its place in the batch or of the
number of processes: a training step runs inside `per_image_seeds`, and whoever draws for image i
asks `generator_for(i, ...)`.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2kit.layers import roi_align
from d2kit.modeling.box_regression import true_rows
from d2kit.structures import BitMasks, Instances, PolygonMasks
from d2kit.utils.devices import upload
from d2kit.utils.env import derive_seed
from d2kit.utils.events import put_scalars

__all__ = [
    "for_image",
    "generator_for",
    "generator_of_image",
    "per_image_seeds",
    "subsample_labels",
    "subsample_masks",
]


_SEEDS: ContextVar[tuple[int, ...] | None] = ContextVar("d2kit_per_image_seeds", default=None)
_IMAGE: ContextVar[int | None] = ContextVar("d2kit_image_of_batch", default=None)


@contextmanager
def per_image_seeds(seeds: Sequence[int] | None) -> Iterator[None]:
    """Let random choices inside the block depend on one seed for each image.

    Args:
        seeds: one integer for each image of the batch; None for torch's global generator.
    """
    token = _SEEDS.set(None if seeds is None else tuple(int(seed) for seed in seeds))
    try:
        yield
    finally:
        _SEEDS.reset(token)


def generator_for(
    image_index: int, stage: str, device: torch.device | str = "cpu"
) -> torch.Generator | None:
    """Return the generator for one random choice on one image of the batch.

    Args:
        image_index: place of the image in the batch.
        stage: names the choice ("rpn", "roi_heads", ...), so that two of them are independent.
        device: where the random numbers are needed.

    Returns:
        A freshly seeded generator, or None (torch's global one) outside `per_image_seeds`.

    Raises:
        ValueError: there are fewer seeds than images.
    """
    seeds = _SEEDS.get()
    if seeds is None:
        return None
    if image_index >= len(seeds):
        raise ValueError(
            f"per_image_seeds got {len(seeds)} seeds, but image {image_index} of the batch needs "
            "one; give one seed for each image."
        )
    seed = derive_seed(seeds[image_index], zlib.crc32(stage.encode()))
    return torch.Generator(device=device).manual_seed(seed)


@contextmanager
def for_image(image_index: int) -> Iterator[None]:
    """Say which image of the batch the choices inside the block are for.

    Args:
        image_index: place of the image in the batch.
    """
    token = _IMAGE.set(image_index)
    try:
        yield
    finally:
        _IMAGE.reset(token)


def generator_of_image(stage: str, device: torch.device | str = "cpu") -> torch.Generator | None:
    """Return `generator_for` the image that `for_image` names; torch's global one outside of it.

    Methods that a subclass may call by itself have no argument for the image.
    """
    image_index = _IMAGE.get()
    return None if image_index is None else generator_for(image_index, stage, device)


def subsample_labels(
    labels: Tensor,
    num_samples: int,
    positive_fraction: float,
    bg_label: int,
    *,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw positives and negatives at random.

    Args:
        labels: integer (R,): -1 is ignored, `bg_label` negative, all else positive.
        num_samples: how many to draw; fewer where there are not enough.
        positive_fraction: at most this fraction of `num_samples` (rounded down) are positives;
            negatives fill up.
        bg_label: the label of negatives.
        generator: source of randomness, on the device of `labels`; by default torch's global one.

    Returns:
        Indices of the positives and of the negatives, int64, each in random order.
    """
    order_pos, is_pos, order_neg, is_neg = _draw(
        labels, num_samples, positive_fraction, bg_label, generator
    )
    # the drawn ones come first in both orders, so that one wait for two numbers is enough
    positives, negatives = torch.stack([is_pos.sum(), is_neg.sum()]).tolist()
    return order_pos[:positives], order_neg[:negatives]


def subsample_masks(
    labels: Tensor,
    num_samples: int,
    positive_fraction: float,
    bg_label: int,
    *,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw exactly what `subsample_labels` draws, as masks and without a host-device sync.

    Args:
        labels: integer (R,): -1 is ignored, `bg_label` negative, all else positive.
        num_samples: how many to draw; fewer where there are not enough.
        positive_fraction: at most this fraction of `num_samples` (rounded down) are positives.
        bg_label: the label of negatives.
        generator: source of randomness, on the device of `labels`; by default torch's global one.

    Returns:
        Two bool masks (R,): the drawn positives, the drawn negatives.
    """
    order_pos, is_pos, order_neg, is_neg = _draw(
        labels, num_samples, positive_fraction, bg_label, generator
    )
    empty = torch.zeros_like(labels, dtype=torch.bool)
    return empty.scatter(0, order_pos, is_pos), empty.scatter(0, order_neg, is_neg)


def _draw(
    labels: Tensor,
    num_samples: int,
    positive_fraction: float,
    bg_label: int,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Candidates in random order and which of them are drawn: positives, then negatives.

    Every element gets a random key; those with the smallest keys among their kind are drawn.
    """
    keys = torch.rand(labels.shape, generator=generator, device=labels.device)
    not_positive = (labels == -1) | (labels == bg_label)
    excluded = 2.0  # keys are below 1
    max_positives = min(int(num_samples * positive_fraction), labels.numel())
    drawn, order_pos = keys.masked_fill(not_positive, excluded).topk(max_positives, largest=False)
    is_pos = drawn < excluded
    max_negatives = min(num_samples, labels.numel())
    drawn, order_neg = keys.masked_fill(labels != bg_label, excluded).topk(
        max_negatives, largest=False
    )
    rank = torch.arange(max_negatives, device=labels.device)
    is_neg = (drawn < excluded) & (rank < num_samples - is_pos.sum())
    return order_pos, is_pos, order_neg, is_neg


class SampledBitMasks(BitMasks):
    """Masks of R regions that share G bitmaps.

    An image of 800x1333 with 512 sampled regions would copy 546 MB of bitmaps (and four times that
    as floating point); this keeps the G bitmaps and R indices.

    Args:
        source: (G, H, W) bool.
        index: (R,) int64, the bitmap of each region.
    """

    def __init__(self, source: Tensor, index: Tensor) -> None:
        self.source = source
        self.index = index
        self.image_size = (int(source.shape[1]), int(source.shape[2]))

    @property
    def tensor(self) -> Tensor:  # type: ignore[override]
        """The bitmap of every region (R, H, W), copied."""
        return self.source[self.index]

    def to(self, *args: object, **kwargs: object) -> SampledBitMasks:
        """Return the masks after `Tensor.to(*args, **kwargs)`."""
        source = BitMasks(self.source).to(*args, **kwargs).tensor
        return SampledBitMasks(source, self.index.to(source.device))

    @property
    def device(self) -> torch.device:
        """The device of the masks."""
        return self.source.device

    def __getitem__(self, item: Any) -> BitMasks:
        """Select masks by an integer (gives one), a slice, a bool mask or indices."""
        if isinstance(item, int):
            return SampledBitMasks(self.source, self.index[item].reshape(1))
        return SampledBitMasks(self.source, self.index[item])

    def __len__(self) -> int:
        return len(self.index)

    def crop_and_resize(self, boxes: Tensor, mask_size: int) -> Tensor:
        """See `BitMasks.crop_and_resize`; the same result."""
        if len(boxes) != len(self):
            raise ValueError(f"BitMasks: expected {len(self)} boxes, got {len(boxes)}")
        index = self.index.to(torch.float32).unsqueeze(1)
        rois = torch.cat([index, boxes.to(self.device).float()], dim=1)
        return roi_align(self.source[:, None].float(), rois, mask_size, 1.0, 0, True)[:, 0] >= 0.5


class SampledPolygonMasks(PolygonMasks):
    """Polygons of R regions that share those of G instances; looked up when they are needed.

    The polygons are on the CPU, the choice on a device: each look-up makes the host wait.

    Args:
        source: of G instances.
        index: (R,) int64, the instance of each region.
    """

    def __init__(self, source: PolygonMasks, index: Tensor) -> None:
        self.source = source
        self.index = index

    @property
    def polygons(self) -> list[list[np.ndarray]]:  # type: ignore[override]
        """Per region a list of polygons."""
        return [self.source.polygons[i] for i in self.index.tolist()]

    def __getitem__(self, item: Any) -> PolygonMasks:
        """Select masks by an integer (gives one), a slice, a bool mask or indices."""
        if isinstance(item, int):
            return SampledPolygonMasks(self.source, self.index[item].reshape(1))
        return SampledPolygonMasks(self.source, self.index[item])

    def __len__(self) -> int:
        return len(self.index)

    def crop_and_resize(self, boxes: Tensor, mask_size: int) -> Tensor:
        """See `PolygonMasks.crop_and_resize`; the same result."""
        return crop_sampled_polygons([self], [boxes], mask_size)


def crop_sampled_polygons(
    masks: Sequence[SampledPolygonMasks], boxes: Sequence[Tensor], mask_size: int
) -> Tensor:
    """Rasterise the regions of all images: one copy to the host and one back.

    Args:
        masks: per image R_i regions.
        boxes: per image (R_i, 4) XYXY, absolute pixels.
        mask_size: M cells per side.

    Returns:
        (R, M, M) bool on the device of the boxes.

    Raises:
        ValueError: if there are not as many boxes as regions.
    """
    for of_image, corners in zip(masks, boxes, strict=True):
        if len(of_image) != len(corners):
            raise ValueError(f"PolygonMasks: expected {len(of_image)} boxes, got {len(corners)}")
    corners = torch.cat([one.detach().float() for one in boxes])
    index = torch.cat([one.index for one in masks])
    table = torch.cat([index[:, None].to(corners), corners], dim=1).cpu()
    polygons: list[list[np.ndarray]] = []
    rows = iter(table[:, 0].long().tolist())
    for of_image in masks:
        polygons += [of_image.source.polygons[next(rows)] for _ in range(len(of_image))]
    chosen = PolygonMasks._of(polygons)
    return upload(chosen.crop_and_resize(table[:, 1:], mask_size), corners.device)


def select_foreground_proposals(
    proposals: list[Instances], bg_label: int
) -> tuple[list[Instances], list[Tensor]]:
    """Keep the proposals that are matched to a ground truth.

    Args:
        proposals: per image, with `gt_classes` (R,).
        bg_label: the class of background; -1 is ignored.

    Returns:
        Per image: its foreground proposals, and which these are, bool (R,).
    """
    masks = [(p.gt_classes != -1) & (p.gt_classes != bg_label) for p in proposals]
    if not masks:
        return [], masks
    counts = torch.stack([mask.sum() for mask in masks]).tolist()  # one wait for all images
    chosen = [
        p[true_rows(mask, count)] for p, mask, count in zip(proposals, masks, counts, strict=True)
    ]
    return chosen, masks


def select_proposals_with_visible_keypoints(proposals: list[Instances]) -> list[Instances]:
    """Keep the proposals that have a labelled keypoint of their ground truth inside.

    Args:
        proposals: per image, foreground only, with `proposal_boxes` and `gt_keypoints`.

    Returns:
        Per image, the kept ones.

    Raises:
        ValueError: if an image has objects but no keypoints.

    Source: Mask R-CNN (He et al. 2017), section 5.
    """
    kept = []
    for i, p in enumerate(proposals):
        if len(p) == 0:
            kept.append(p)
            continue
        if not p.has("gt_keypoints"):
            raise ValueError(
                f"image {i} of the batch has objects without gt_keypoints, it has "
                f"{sorted(p.get_fields())}: a keypoint head (MODEL.KEYPOINT_ON) needs 'keypoints' "
                "in every annotation"
            )
        points = p.gt_keypoints.tensor
        boxes = p.proposal_boxes.tensor.unsqueeze(1)
        inside = ((points[..., :2] >= boxes[..., :2]) & (points[..., :2] <= boxes[..., 2:])).all(-1)
        usable = (inside & (points[..., 2] >= 1)).any(dim=1)
        kept.append(p[usable.nonzero().squeeze(1)])
    put_scalars("keypoint_head", num_fg_samples=sum(map(len, kept)) / max(1, len(kept)))
    return kept


def attach_targets(proposals: Instances, targets: Instances, matched: Tensor) -> None:
    """Copy the `gt_*` fields of the matched ground truths onto sampled proposals, in place.

    An image without ground truths has nothing to copy; its proposals stay without these fields.

    Args:
        proposals: R sampled proposals.
        targets: G ground truths.
        matched: (R,) int64, index of the ground truth of each proposal.
    """
    if len(targets) == 0:
        return
    for name, value in targets.get_fields().items():
        if not name.startswith("gt_") or proposals.has(name):
            continue
        if type(value) is BitMasks:
            proposals.set(name, SampledBitMasks(value.tensor, matched))
        elif type(value) is PolygonMasks:
            proposals.set(name, SampledPolygonMasks(value, matched))
        else:
            proposals.set(name, value[matched])


def check_targets(targets: list[Instances] | None, where: str) -> list[Instances]:
    """Return `targets`.

    Raises:
        ValueError: if they are missing or lack boxes or classes.
    """
    if targets is None:
        raise ValueError(f"{where} needs ground truths (targets) in training mode, got None")
    for i, target in enumerate(targets):
        missing = [n for n in ("gt_boxes", "gt_classes") if not target.has(n)]
        if missing:
            raise ValueError(
                f"{where}: the ground truth of image {i} of the batch lacks {missing}; "
                f"it has {sorted(target.get_fields())}. What maps the dataset must set them."
            )
    return targets
