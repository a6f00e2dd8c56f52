"""Feeds the ground truth of a dataset to its own evaluation, which must give AP 100."""

from __future__ import annotations

from collections import Counter
from os import PathLike, fspath
from typing import Any

from d2kit.evaluation._coco_backend import _evaluate_predictions_on_coco, load_ground_truth
from d2kit.evaluation._coco_results import derive_results

__all__ = ["ground_truth_ap"]


def ground_truth_ap(
    json_file: str | PathLike[str], *, use_fast_impl: bool = True
) -> dict[str, float]:
    """Compute AP with the annotations, crowds left out, as detections of score 1.

    A figure below 100 says that boxes, masks, areas or ids of the file contradict each other, or
    that objects lie exactly on top of each other. All annotations of an image count, however many.

    Args:
        json_file: COCO annotations.
        use_fast_impl: hotcoco, as `COCOEvaluator` does; else pycocotools.

    Returns:
        ``bbox``, and ``segm`` where every annotation has a mask -> AP in percent.

    Raises:
        ValueError: the file is no COCO JSON, or has nothing to detect.
    """
    truth = load_ground_truth(fspath(json_file), use_fast_impl)
    objects = [a for a in truth.dataset["annotations"] if not a.get("iscrowd", 0)]
    if not objects:
        raise ValueError(f"{json_file}: no annotation that is not a crowd; AP is not defined")
    most = max(Counter(a["image_id"] for a in objects).values())
    found: dict[str, float] = {}
    for kind, key in (("bbox", "bbox"), ("segm", "segmentation")):
        if all(a.get(key) for a in objects):
            results = [
                {
                    "image_id": a["image_id"],
                    "category_id": a["category_id"],
                    "score": 1.0,
                    key: _run_lengths(truth, a) if kind == "segm" else a["bbox"],
                }
                for a in objects
            ]
            evaluation = _evaluate_predictions_on_coco(
                truth, results, kind, use_fast_impl=use_fast_impl, max_dets_per_image=max(100, most)
            )
            found[kind] = derive_results(evaluation, kind, None)["AP"]
    return found


def _run_lengths(truth: Any, annotation: dict[str, Any]) -> dict[str, Any]:
    rle = truth.annToRLE(annotation)
    counts = rle["counts"]
    return {
        "size": list(rle["size"]),
        "counts": counts.decode() if isinstance(counts, bytes) else counts,
    }
