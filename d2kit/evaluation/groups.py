"""AP by group (video, patient, camera), with bootstrap confidence intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

import numpy as np

from d2kit.data.records import group_images
from d2kit.evaluation.backend import _evaluate_predictions_on_coco, load_ground_truth
from d2kit.evaluation.coco_results import derive_results
from d2kit.utils.text import one_line

if TYPE_CHECKING:
    from pycocotools.coco import COCO

__all__ = ["GroupAP", "ap_by_group", "table_of_groups"]


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


def _run_lengths(truth: COCO, annotation: dict[str, Any]) -> dict[str, Any]:
    rle = truth.annToRLE(annotation)
    counts = rle["counts"]
    return {
        "size": list(rle["size"]),
        "counts": counts.decode() if isinstance(counts, bytes) else counts,
    }


METRICS = ("AP", "AP50", "AP75")
OVERALL = "all, by group"


class GroupAP(dict[str, Any]):
    """Figures of one group: ``images``, ``AP``, ``AP50``, ``AP75``, ``low`` and ``high`` of AP."""


def ap_by_group(
    ground_truth: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    *,
    group: str = "video",
    iou_type: str = "bbox",
    samples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, GroupAP]:
    """Compute AP of each group and of all, with percentile bootstrap intervals.

    Of a group, its images are drawn again; of all, whole groups are, because images of one video
    are not independent. The first says how sure the figure is for this video, the second for a new
    one.

    Args:
        ground_truth: COCO dictionary with annotations.
        results: COCO results of its images (``image_id``, ``category_id``, ``bbox``, ``score``, and
            ``segmentation`` for masks).
        group: see `d2kit.data.records.group_images`.
        iou_type: ``bbox`` or ``segm``.
        samples: bootstrap samples.
        confidence: in (0, 1).
        seed: of the samples.

    Returns:
        Group -> figures in percent, ``"all, by group"`` last; NaN where nothing defines them. The
        interval of all is NaN where there is one group only.

    Source: Efron & Tibshirani 1993, chapter 13; drawing whole groups: Field & Welsh 2007.
    """
    rng = np.random.default_rng(seed)
    groups = {name: np.array(ids) for name, ids in group_images(ground_truth, group).items()}
    everything = list(groups.values())
    draws = {
        name: [rng.choice(ids, len(ids)) for _ in range(samples)] for name, ids in groups.items()
    }
    if len(groups) > 1:
        picks = rng.integers(0, len(groups), (samples, len(groups)))
        draws[OVERALL] = [np.concatenate([everything[i] for i in pick]) for pick in picks]
    groups[OVERALL] = np.concatenate(everything)
    copies = max(
        (int(np.bincount(_compact(d)).max()) for ds in draws.values() for d in ds), default=1
    )
    evaluation, step = _evaluate(ground_truth, results, iou_type, copies)
    slices = {f"{name}/whole": ids.tolist() for name, ids in groups.items()}
    for name, many in draws.items():
        slices |= {f"{name}/{i}": _distinct(draw, step) for i, draw in enumerate(many)}
    found = evaluation.slice_by(slices)
    return {
        name: GroupAP(
            images=len(ids),
            **{m: _percent(found[f"{name}/whole"][m]) for m in METRICS},
            **_interval(
                [found[f"{name}/{i}"]["AP"] for i in range(len(draws.get(name, [])))], confidence
            ),
        )
        for name, ids in groups.items()
    }


def _interval(drawn: list[float], confidence: float) -> dict[str, float]:
    """Return the percentile interval of the AP of bootstrap samples."""
    known = [100 * value for value in drawn if value >= 0]
    tail = 50 * (1 - confidence)
    low, high = np.percentile(known, [tail, 100 - tail]) if known else (np.nan, np.nan)
    return {"low": float(low), "high": float(high)}


def _compact(draw: np.ndarray) -> np.ndarray:
    return np.unique(draw, return_inverse=True)[1]


def _percent(value: float) -> float:
    return 100 * value if value >= 0 else float("nan")


def _distinct(draw: np.ndarray, step: int) -> list[int]:
    """Replace the second, third, ... draw of an image by the ids of its copies."""
    order = np.argsort(draw, kind="stable")
    ordered = draw[order]
    first = np.searchsorted(ordered, ordered)
    found: list[int] = (ordered + step * (np.arange(len(ordered)) - first)).tolist()
    return found


def _evaluate(
    ground_truth: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    iou_type: str,
    copies: int,
) -> tuple[Any, int]:
    """Evaluate a dataset that holds each image `copies` times, `step` apart in its ids."""
    import hotcoco

    step = 1 + max(image["id"] for image in ground_truth["images"])
    annotations = ground_truth["annotations"]
    images = [
        {**im, "id": im["id"] + k * step} for k in range(copies) for im in ground_truth["images"]
    ]
    boxes = [
        {**a, "image_id": a["image_id"] + k * step, "id": 1 + i + k * len(annotations)}
        for k in range(copies)
        for i, a in enumerate(annotations)
    ]
    truth = hotcoco.COCO(
        {"images": images, "annotations": boxes, "categories": ground_truth["categories"]}
    )
    found = [{**r, "image_id": r["image_id"] + k * step} for k in range(copies) for r in results]
    evaluation = hotcoco.COCOeval(truth, truth.load_res(found), iou_type)
    evaluation.evaluate()
    return evaluation, step


def table_of_groups(figures: Mapping[str, GroupAP], confidence: float = 0.95) -> str:
    """Return the figures of `ap_by_group` as a table."""
    from tabulate import tabulate

    head = ["group", "images", *METRICS, f"AP, {100 * confidence:g} % interval"]
    rows = [
        [
            one_line(name),
            g["images"],
            *(g[m] for m in METRICS),
            f"{g['low']:.1f} to {g['high']:.1f}",
        ]
        for name, g in figures.items()
    ]
    return tabulate(rows, head, floatfmt=".1f", tablefmt="github")
