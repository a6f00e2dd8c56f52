"""How much detections of two frames overlap, and an order of detections that is their own."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from d2kit.structures import BitMasks, Instances, pairwise_iou

ASSOCIATIONS = ("box", "mask")


def check_association(association: str) -> str:
    """Return `association`, or raise a ValueError that names the choices."""
    if association not in ASSOCIATIONS:
        raise ValueError(
            f"TRACKER_HEADS.ASSOCIATION: expected one of {ASSOCIATIONS}, got {association!r}"
        )
    return association


def overlap(instances: Instances, previous: Instances, association: str) -> np.ndarray:
    """Return the IoU of every detection with every object of the previous frame.

    Args:
        instances: R detections with `pred_boxes`; for masks with `pred_masks`.
        previous: P objects with the same fields.
        association: "box" or "mask".

    Returns:
        (R, P) float64 in [0, 1].

    Raises:
        ValueError: for "mask" where the detections have none.
    """
    if len(instances) == 0 or len(previous) == 0:
        return np.zeros((len(instances), len(previous)))
    if association == "box":
        iou = pairwise_iou(instances.pred_boxes, previous.pred_boxes)
        return iou.detach().cpu().numpy().astype(np.float64)
    for side in (instances, previous):
        if not side.has("pred_masks"):
            raise ValueError(
                "TRACKER_HEADS.ASSOCIATION mask: the detections have no field 'pred_masks' "
                f"(they have {sorted(side.get_fields())}); use a model with masks, or "
                "TRACKER_HEADS.ASSOCIATION box"
            )
    return mask_iou(instances.pred_masks, previous.pred_masks)


def mask_iou(first: Any, second: Any) -> np.ndarray:
    """Return the pairwise IoU of masks.

    Args:
        first: (R, H, W) bool tensor or `BitMasks`, or a list of R RLE dicts.
        second: P masks, in the same form.

    Returns:
        (R, P) float64 in [0, 1]; 0 where both masks are empty.
    """
    if isinstance(first, list) and isinstance(second, list):
        from pycocotools import mask as mask_util

        return np.asarray(mask_util.iou(first, second, [0] * len(second)), np.float64)
    flat = [_bits(masks).flatten(1).to(torch.float32) for masks in (first, second)]
    common = flat[0] @ flat[1].T
    union = flat[0].sum(1)[:, None] + flat[1].sum(1)[None] - common
    return (common / union.clamp(min=1)).cpu().numpy().astype(np.float64)


def _bits(masks: Any) -> torch.Tensor:
    tensor = masks.tensor if isinstance(masks, BitMasks) else masks
    if not isinstance(tensor, torch.Tensor) or tensor.dim() != 3:
        raise ValueError(
            "TRACKER_HEADS.ASSOCIATION mask: pred_masks must be full-size masks (R, H, W), "
            f"BitMasks or a list of run-length dicts, got {type(masks).__name__}"
        )
    return tensor.detach() > 0.5 if tensor.is_floating_point() else tensor.detach() != 0


def canonical_order(instances: Instances) -> np.ndarray:
    """Return an order of detections that depends on what they are, not on where they stand.

    Best score first, then class and box. Two detections that tie are equal in all of it.

    Args:
        instances: R detections with `pred_boxes`, optionally `scores` and `pred_classes`.

    Returns:
        (R,) int64 permutation.
    """
    keys = list(instances.pred_boxes.tensor.detach().cpu().numpy().T[::-1])
    if instances.has("pred_classes"):
        keys.append(instances.pred_classes.detach().cpu().numpy())
    if instances.has("scores"):
        keys.append(-instances.scores.detach().cpu().numpy())
    return np.lexsort(keys)
