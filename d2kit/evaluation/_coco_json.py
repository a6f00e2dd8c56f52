"""From `Instances` to COCO's result format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from d2kit.structures import BitMasks, Boxes, Instances, ROIMasks


def instances_to_coco_json(instances: Instances, img_id: int | str) -> list[dict[str, Any]]:
    """Turn the detections of one image into dicts of COCO's result format.

    Args:
        instances: R detections with `pred_boxes` (R, 4), `scores` (R,), `pred_classes` (R,);
            optionally `pred_masks`, a bool tensor or `BitMasks` (R, H, W), `ROIMasks` or
            probabilities (R, M, M) inside the boxes (thresholded at 0.5 and encoded without a
            full-size mask), or RLE dicts; optionally `pred_keypoints` (R, 17, 3), x, y, score.
        img_id: goes into every dict.

    Returns:
        R dicts with ``image_id``, ``category_id`` (the contiguous class), ``bbox`` (XYWH),
        ``score`` and where predicted ``segmentation`` (RLE, ``counts`` as str) and ``keypoints``.
    """
    count = len(instances)
    if count == 0:
        return []
    boxes = _tensor(instances.pred_boxes).detach().cpu().clone()
    boxes[:, 2:] -= boxes[:, :2]
    rows = zip(
        boxes.tolist(), instances.scores.tolist(), instances.pred_classes.tolist(), strict=True
    )
    results: list[dict[str, Any]] = [
        {"image_id": img_id, "category_id": category, "bbox": box, "score": score}
        for box, score, category in rows
    ]
    if instances.has("pred_masks"):
        for result, rle in zip(results, _encode_masks(instances), strict=True):
            result["segmentation"] = rle
    if instances.has("pred_keypoints"):
        keypoints = _tensor(instances.pred_keypoints).detach().cpu().clone()
        keypoints[:, :, :2] -= 0.5  # COCO names pixels, we name points: a pixel's centre is at +0.5
        for result, flat in zip(results, keypoints.flatten(1).tolist(), strict=True):
            result["keypoints"] = flat
    return results


def _tensor(value: Any) -> torch.Tensor:
    """Return the tensor inside `Boxes`, `Keypoints`, ..., or the tensor itself."""
    return value if isinstance(value, torch.Tensor) else value.tensor


def _encode_masks(instances: Instances) -> list[dict[str, Any]]:
    """Encode `pred_masks` as RLE with ``counts`` as str."""
    masks = instances.pred_masks
    if isinstance(masks, Sequence) and len(masks) and isinstance(masks[0], dict):
        return [_text_rle(rle) for rle in masks]
    if isinstance(masks, BitMasks):
        masks = masks.tensor
    if isinstance(masks, ROIMasks) or (
        isinstance(masks, torch.Tensor) and masks.is_floating_point()
    ):
        from d2kit.layers.mask_ops import masks_to_rle

        probabilities = masks.tensor if isinstance(masks, ROIMasks) else masks
        if probabilities.dim() == 4:
            probabilities = probabilities[:, 0]
        boxes = _tensor(instances.pred_boxes)
        if isinstance(masks, ROIMasks):
            boxes = masks.places(boxes)
        return [_text_rle(r) for r in masks_to_rle(probabilities, boxes, instances.image_size)]
    return encode_bitmasks(masks)


def encode_bitmasks(masks: torch.Tensor | np.ndarray) -> list[dict[str, Any]]:
    """Encode full-size masks as RLE.

    Args:
        masks: (R, H, W) bool or uint8.

    Returns:
        R dicts ``{"size": [H, W], "counts": str}``.
    """
    import hotcoco

    array = masks.detach().cpu().numpy() if isinstance(masks, torch.Tensor) else np.asarray(masks)
    if len(array) == 0:
        return []
    if array.dtype not in (np.bool_, np.uint8):
        array = array != 0
    return [_text_rle(rle) for rle in hotcoco.mask.encode(array.transpose(1, 2, 0))]


def _text_rle(rle: dict[str, Any]) -> dict[str, Any]:
    """Make ``counts`` a str, so that the dict can be written as JSON."""
    counts = rle["counts"]
    text = counts.decode("ascii") if isinstance(counts, bytes) else counts
    return {"size": [int(side) for side in rle["size"]], "counts": text}


def instances_from_coco_json(
    results: Sequence[Mapping[str, Any]],
    image_size: tuple[int, int],
    to_class: Mapping[int, int] | None = None,
) -> Instances:
    """Turn results of one image back into detections; the reverse of `instances_to_coco_json`.

    Args:
        results: R dicts of COCO's result format.
        image_size: (h, w) in pixels.
        to_class: category id -> contiguous class; None: the ids are classes.

    Returns:
        R detections with `pred_boxes`, `scores`, `pred_classes`, and where all results have them
        `pred_masks` (run-length masks) and `pred_keypoints` (R, K, 3).

    Raises:
        ValueError: a result lacks a field, or has a category that is not in `to_class`.
    """
    rows = []
    for result in results:
        missing = [key for key in ("category_id", "bbox", "score") if key not in result]
        if missing:
            raise ValueError(f"a result has no {', '.join(missing)}: {str(dict(result)):.80}")
        category = result["category_id"]
        if to_class is not None and category not in to_class:
            raise ValueError(f"category id {category} of a result is not one of the dataset")
        rows.append((result, category if to_class is None else to_class[category]))
    boxes = torch.tensor([r["bbox"] for r, _ in rows], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    instances = Instances(image_size, pred_boxes=Boxes(boxes))
    instances.scores = torch.tensor([float(r["score"]) for r, _ in rows])
    instances.pred_classes = torch.tensor([c for _, c in rows], dtype=torch.int64)
    if rows and all("segmentation" in r for r, _ in rows):
        instances.pred_masks = [r["segmentation"] for r, _ in rows]
    if rows and all("keypoints" in r for r, _ in rows):
        points = torch.tensor([r["keypoints"] for r, _ in rows], dtype=torch.float32)
        points = points.reshape(len(rows), -1, 3)
        points[..., :2] += 0.5  # from pixels to points, see `instances_to_coco_json`
        instances.pred_keypoints = points
    return instances
