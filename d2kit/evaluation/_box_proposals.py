"""Recall of class-agnostic box proposals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

AREA_RANGES: dict[str, tuple[float, float]] = {  # square pixels
    "all": (0**2, 1e5**2),
    "small": (0**2, 32**2),
    "medium": (32**2, 96**2),
    "large": (96**2, 1e5**2),
    "96-128": (96**2, 128**2),
    "128-256": (128**2, 256**2),
    "256-512": (256**2, 512**2),
    "512-inf": (512**2, 1e5**2),
}


def _evaluate_box_proposals(
    dataset_predictions: Sequence[dict[str, Any]],
    coco_api: Any,
    thresholds: torch.Tensor | None = None,
    area: str = "all",
    limit: int | None = None,
) -> dict[str, Any]:
    """Measure how many ground-truth boxes the best `limit` proposals of each image cover.

    Proposals and ground truths are matched one to one, greedily by IoU.

    Args:
        dataset_predictions: per image ``image_id`` and ``proposals``: `Instances` with
            `proposal_boxes` (R, 4) and `objectness_logits` (R,).
        coco_api: ground truth, pycocotools or hotcoco ``COCO``.
        thresholds: (T,) IoU thresholds; default 0.5, 0.55, ..., 0.95.
        area: a key of `AREA_RANGES`; ground truths of another ``area`` are not counted.
        limit: proposals per image, highest `objectness_logits` first; default all.

    Returns:
        ``ar`` (mean of the recalls), ``recalls`` (T,), ``thresholds`` (T,), ``gt_overlaps``: the
        sorted IoU of each ground truth with its proposal, ``num_pos``: how many there are.

    Raises:
        ValueError: unknown `area`.

    Source: Hosang et al., "What makes for effective detection proposals?", section 5 (AR).
    """
    if area not in AREA_RANGES:
        raise ValueError(f"Unknown area range {area!r}; there are {', '.join(AREA_RANGES)}")
    if thresholds is None:
        thresholds = torch.arange(0.5, 0.95 + 1e-5, 0.05, dtype=torch.float32)
    overlaps = []
    for prediction in dataset_predictions:
        truths = _ground_truth_boxes(coco_api, prediction["image_id"], AREA_RANGES[area])
        proposals = prediction["proposals"]
        order = proposals.objectness_logits.argsort(descending=True, stable=True)[:limit]
        boxes = proposals.proposal_boxes.tensor[order].detach().cpu()
        overlaps.append(_greedy_overlaps(boxes, truths))
    gt_overlaps = torch.cat(overlaps).sort().values if overlaps else torch.zeros(0)
    num_pos = len(gt_overlaps)
    covered = (gt_overlaps[None, :] >= thresholds[:, None]).float().sum(dim=1)
    recalls = covered / num_pos if num_pos else torch.full_like(thresholds, float("nan"))
    return {
        "ar": recalls.mean(),
        "recalls": recalls,
        "thresholds": thresholds,
        "gt_overlaps": gt_overlaps,
        "num_pos": num_pos,
    }


def _ground_truth_boxes(
    coco_api: Any, image_id: int, area_range: tuple[float, float]
) -> torch.Tensor:
    """Return the (G, 4) XYXY boxes of an image that are no crowd and of the right area."""
    low, high = area_range
    annotations = coco_api.loadAnns(coco_api.getAnnIds(imgIds=[image_id]))
    boxes = [
        ann["bbox"]
        for ann in annotations
        if not ann.get("iscrowd", 0) and low <= ann["area"] <= high
    ]
    tensor = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    tensor[:, 2:] += tensor[:, :2]
    return tensor


def _greedy_overlaps(boxes: torch.Tensor, truths: torch.Tensor) -> torch.Tensor:
    """Match (R, 4) boxes to (G, 4) truths by falling IoU; return (G,) IoU, 0 if unmatched."""
    from torchvision.ops import box_iou

    result = torch.zeros(len(truths))
    if len(truths) == 0 or len(boxes) == 0:
        return result
    iou = box_iou(boxes, truths).numpy()
    for _ in range(min(iou.shape)):
        box, truth = np.unravel_index(iou.argmax(), iou.shape)
        if iou[box, truth] <= 0:
            break
        result[truth] = float(iou[box, truth])
        iou[box, :] = -1
        iou[:, truth] = -1
    return result
