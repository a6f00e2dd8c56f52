"""Selection of the proposals that a loss looks at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2kit.layers import roi_align
from d2kit.modeling.box_regression import true_rows
from d2kit.structures import BitMasks, Instances, PolygonMasks
from d2kit.utils.devices import upload
from d2kit.utils.event_storage import put_scalars


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

    def to(self, *args: Any, **kwargs: Any) -> SampledBitMasks:
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
