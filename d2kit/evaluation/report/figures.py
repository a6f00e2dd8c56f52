"""The figures of a report: what hotcoco says of the stored results of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from d2kit.evaluation.backend import load_ground_truth
from d2kit.evaluation.coco_results import derive_results
from d2kit.evaluation.groups import OVERALL, GroupAP, ap_by_group

__all__ = ["ERRORS", "Figures", "Threshold", "evaluate_results", "interval_of", "prepare"]

TASKS = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}
ERRORS = {
    "Cls": "wrong class",
    "Loc": "badly placed",
    "Both": "wrong class and badly placed",
    "Dupe": "found twice",
    "Bkg": "background taken for an object",
    "Miss": "missed",
}
"""hotcoco's names of TIDE's error kinds -> ours."""
IOU = 0.5
SAMPLES = 200
MOST_CLASSES = 20
"""Of more classes, no interval per class is computed: each costs a bootstrap of its own."""
MOST_GROUPS = 60
SIDES = (0, 16, 32, 64, 96, 192, math.inf)
"""Edges of the bins of object size: square root of the area, pixels."""


@dataclass
class Threshold:
    """The score at which F1 is highest, and what it gives there, all in [0, 1]; nan: undefined."""

    score: float = math.nan
    precision: float = math.nan
    recall: float = math.nan
    f1: float = math.nan


@dataclass
class Figures:
    """What is shown of one test set.

    Attributes:
        names: K classes, by rising category id.
        truths: K, annotations that are no crowd.
        ap: task -> metric -> percent, see `COCOEvaluator`.
        intervals: task -> (low, high) of AP, percent.
        over: what was drawn again for the intervals, ``images`` or ``videos``.
        class_intervals: class -> (low, high) of box AP, percent.
        groups: video -> figures, of boxes; empty where there is one video only.
        curves: class -> (101,) precision at recall 0, 0.01, ... 1, boxes, IoU 0.5.
        thresholds: class -> `Threshold`; ``all`` for all together.
        confusion: (K + 1, K + 1) truth by prediction at the threshold of all; background last.
        tide: task -> hotcoco's ``tide_errors``.
        calibration: hotcoco's ``calibration``.
        sizes: (label, objects, share found at the threshold of all in [0, 1]) by size.
        errors: image id -> (right, wrong, missed) at the threshold of all.
        label_errors: hotcoco's candidates, most certain first.
        right: indices of results that match an annotation of their class.
        found: annotation ids that are found at the threshold of all.
    """

    names: list[str]
    truths: list[int]
    ap: dict[str, dict[str, float]] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    over: str = "images"
    class_intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    groups: dict[str, GroupAP] = field(default_factory=dict)
    curves: dict[str, np.ndarray] = field(default_factory=dict)
    thresholds: dict[str, Threshold] = field(default_factory=dict)
    confusion: np.ndarray = field(default_factory=lambda: np.zeros((1, 1), np.int64))
    tide: dict[str, dict[str, Any]] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    sizes: list[tuple[str, int, float]] = field(default_factory=list)
    errors: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    label_errors: list[dict[str, Any]] = field(default_factory=list)
    right: set[int] = field(default_factory=set)
    found: set[int] = field(default_factory=set)

    @property
    def threshold(self) -> float:
        """Score at which pictures, confusion and sizes count; 0.5 where none is best."""
        score = self.thresholds["all"].score
        return score if math.isfinite(score) else 0.5


def prepare(
    truth: Any, results: Sequence[Mapping[str, Any]], task: str, sigmas: Sequence[float] = ()
) -> Any:
    """Match results with a ground truth.

    Args:
        truth: ``hotcoco.COCO``.
        results: in COCO's format; detection i gets the id i + 1.
        task: ``bbox``, ``segm`` or ``keypoints``.
        sigmas: of the keypoints; empty for COCO's.

    Returns:
        ``hotcoco.COCOeval``, evaluated and accumulated.
    """
    import hotcoco

    keys: tuple[str, ...] = ("image_id", "category_id", "score", TASKS[task])
    keys += ("bbox",) if task == "keypoints" else ()
    found = truth.load_res([{k: r[k] for k in keys if k in r} for r in results])
    evaluation = hotcoco.COCOeval(truth, found, task)
    if task == "keypoints" and sigmas:
        evaluation.params.kpt_oks_sigmas = list(sigmas)
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation


def interval_of(evaluation: Any, samples: int = SAMPLES) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of AP over images, percent.

    hotcoco draws the images again for the difference of two evaluations; the other one found
    nothing, so that the difference is the AP itself.
    """
    import hotcoco

    truth = evaluation.coco_gt
    nothing = hotcoco.COCOeval(truth, truth.load_res([]), evaluation.params.iouType)
    nothing.params.catIds = evaluation.params.catIds
    nothing.evaluate()
    bounds = hotcoco.compare(nothing, evaluation, n_bootstrap=samples)["ci"]["AP"]
    return 100 * bounds["lower"], 100 * bounds["upper"]


def evaluate_results(
    json_file: str, results: Sequence[Mapping[str, Any]], sigmas: Sequence[float] = ()
) -> Figures:
    """Compute everything that a report shows of a test set.

    Args:
        json_file: COCO annotations.
        results: COCO results of its images.
        sigmas: of keypoints.
    """
    truth = load_ground_truth(json_file, True)
    categories = sorted(truth.dataset["categories"], key=lambda c: c["id"])
    objects = [a for a in truth.dataset["annotations"] if not a.get("iscrowd", 0)]
    counts = np.bincount(
        np.searchsorted([c["id"] for c in categories], [a["category_id"] for a in objects]),
        minlength=len(categories),
    )
    figures = Figures([str(c["name"]) for c in categories], counts.tolist())
    boxes = None
    for task in _tasks(results, objects):
        evaluation = prepare(truth, results, task, sigmas)
        figures.ap[task] = derive_results(evaluation, task, figures.names)
        if objects:
            figures.intervals[task] = interval_of(evaluation)
        if task != "keypoints":
            figures.tide[task] = evaluation.tide_errors(pos_thr=IOU)
        boxes = boxes or evaluation
    _add_groups(figures, truth.dataset, results)
    if boxes is not None:
        _add_curves(figures, boxes)
        _add_detections(figures, boxes, results, objects, [c["id"] for c in categories])
        figures.confusion = np.asarray(
            boxes.confusion_matrix(iou_thr=IOU, min_score=figures.threshold)["matrix"], np.int64
        )
        figures.calibration = boxes.calibration(n_bins=10, iou_threshold=IOU)
        if 1 < len(figures.names) <= MOST_CLASSES:
            _add_class_intervals(figures, truth, results, categories)
    return figures


def _tasks(results: Sequence[Mapping[str, Any]], objects: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the tasks that both results and annotations can answer; boxes always."""
    have = {key for r in results[:1] for key in r} & {key for a in objects[:1] for key in a}
    return [task for task, key in TASKS.items() if task == "bbox" or key in have]


def _add_groups(
    figures: Figures, coco: Mapping[str, Any], results: Sequence[Mapping[str, Any]]
) -> None:
    """Add AP by video and, where there are videos, draw them and not their images."""
    from d2kit.data.groups import group_images

    found = group_images(coco)
    if not 1 < len(found) <= MOST_GROUPS or len(found) == len(coco["images"]) or not results:
        return
    figures.groups = ap_by_group(coco, results, samples=SAMPLES)
    figures.over = "videos"
    for task in figures.intervals.keys() & {"bbox", "segm"}:
        overall = (
            figures.groups
            if task == "bbox"
            else ap_by_group(coco, results, iou_type=task, samples=SAMPLES)
        )[OVERALL]
        figures.intervals[task] = (overall["low"], overall["high"])


def _add_curves(figures: Figures, evaluation: Any) -> None:
    precision = np.asarray(evaluation.eval["precision"])  # (T, R, K, A, M), T = 0 is IoU 0.5
    for k, name in enumerate(figures.names):
        curve = precision[0, :, k, 0, -1]
        if (curve > -1).all():
            figures.curves[name] = curve


def _add_class_intervals(
    figures: Figures,
    truth: Any,
    results: Sequence[Mapping[str, Any]],
    categories: Sequence[Mapping[str, Any]],
) -> None:
    import hotcoco

    boxes = [
        {k: r[k] for k in ("image_id", "category_id", "score", "bbox") if k in r} for r in results
    ]
    found = truth.load_res(boxes)
    for category, name, count in zip(categories, figures.names, figures.truths, strict=True):
        if count:
            one = hotcoco.COCOeval(truth, found, "bbox")
            one.params.catIds = [category["id"]]
            one.evaluate()
            figures.class_intervals[name] = interval_of(one)


def _add_detections(
    figures: Figures,
    evaluation: Any,
    results: Sequence[Mapping[str, Any]],
    objects: Sequence[Mapping[str, Any]],
    ids: Sequence[int],
) -> None:
    """Add what follows from each detection's being right or wrong at IoU 0.5."""
    found = evaluation.image_diagnostics(iou_thr=IOU, score_thr=0.5)
    scores = np.array([r["score"] for r in results], np.float64)
    classes = np.array([r["category_id"] for r in results], np.int64)
    status = np.array([found["dt_status"].get(i + 1, "") for i in range(len(results))], object)
    right, counted = status == "tp", (status == "tp") | (status == "fp")
    for name, category, count in zip(figures.names, ids, figures.truths, strict=True):
        mine = counted & (classes == category)
        figures.thresholds[name] = best_threshold(scores[mine], right[mine], count)
    figures.thresholds["all"] = best_threshold(scores[counted], right[counted], len(objects))
    kept = counted & (scores >= figures.threshold)
    figures.right = set(np.flatnonzero(right).tolist())
    hit = {found["dt_match"][i + 1] for i in np.flatnonzero(kept & right).tolist()}
    figures.found = hit
    tally = {image["id"]: [0, 0, 0] for image in evaluation.coco_gt.dataset["images"]}
    for i in np.flatnonzero(kept).tolist():
        tally[results[i]["image_id"]][0 if right[i] else 1] += 1
    for a in objects:
        tally[a["image_id"]][2] += a["id"] not in hit
    figures.errors = {image: (r, w, m) for image, (r, w, m) in tally.items()}
    figures.label_errors = sorted(found["label_errors"], key=lambda e: -e["dt_score"])
    sides = np.sqrt([max(0.0, float(a.get("area") or _area(a))) for a in objects])
    is_hit = np.array([a["id"] in hit for a in objects], bool)
    for low, high in zip(SIDES[:-1], SIDES[1:], strict=True):
        mine = (sides >= low) & (sides < high)
        if mine.any():
            label = f"{low:g} to {high:g} px" if math.isfinite(high) else f"{low:g} px and more"
            figures.sizes.append((label, int(mine.sum()), float(is_hit[mine].mean())))


def _area(annotation: Mapping[str, Any]) -> float:
    return float(annotation["bbox"][2] * annotation["bbox"][3])


def best_threshold(scores: np.ndarray, right: np.ndarray, truths: int) -> Threshold:
    """Find the score that keeps the detections with the highest F1.

    Args:
        scores: (R,) of detections.
        right: (R,) bool.
        truths: number of objects there are.
    """
    if not truths or not len(scores):
        return Threshold()
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order], right[order].cumsum()
    kept = np.arange(1, len(scores) + 1)
    last = np.append(scores[1:] != scores[:-1], True)  # a tie is kept or dropped as a whole
    f1 = np.where(last, 2 * hits / (truths + kept), -1)
    i = int(f1.argmax())
    return Threshold(
        float(scores[i]), float(hits[i] / kept[i]), float(hits[i] / truths), float(f1[i])
    )
