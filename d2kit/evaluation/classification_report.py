"""`ClassificationReport`: how well a detector tells classes, in the terms of classification."""

from __future__ import annotations

import json
import logging
import math
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from d2kit.data import DatasetCatalog, MetadataCatalog
from d2kit.evaluation.evaluator import (
    DatasetEvaluator,
    gather_on_main,
    once_per_image,
    results_file,
)
from d2kit.structures import BoxMode

__all__ = ["ClassificationReport"]


@dataclass
class ImageEntry:
    """Ground truth and detections of one image.

    Attributes:
        gt_boxes: (G, 4) XYXY pixels.
        gt_classes: (G,) int.
        crowd: (G,) bool; detections on a crowd are neither right nor wrong.
        boxes: (R, 4) XYXY pixels.
        scores: (R,) in [0, 1].
        classes: (R,) int.
    """

    gt_boxes: np.ndarray
    gt_classes: np.ndarray
    crowd: np.ndarray
    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))
    scores: np.ndarray = field(default_factory=lambda: np.zeros(0))
    classes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


def pairwise_iou(a: np.ndarray, b: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """Return the (R, G) IoU of XYXY boxes; over a crowd, the share of the detection inside it."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(2)
    area_a, area_b = (np.clip(x[:, 2:] - x[:, :2], 0, None).prod(1) for x in (a, b))
    union = np.where(crowd, area_a[:, None], area_a[:, None] + area_b[None] - shared)
    found: np.ndarray = shared / np.maximum(union, 1e-9)
    return found


def match(entry: ImageEntry, threshold: float, by_class: bool) -> np.ndarray:
    """Give each detection, best score first, the free ground truth that it overlaps most.

    Args:
        entry: the image.
        threshold: least IoU of a match.
        by_class: only ground truths of the detection's class are candidates.

    Returns:
        (R,) int: index of the ground truth, -1 for none, -2 for a detection on a crowd.
    """
    iou = pairwise_iou(entry.boxes, entry.gt_boxes, entry.crowd)
    if by_class:
        iou = np.where(entry.classes[:, None] == entry.gt_classes[None], iou, -1)
    found = np.full(len(entry.boxes), -1)
    free = ~entry.crowd
    for i in np.argsort(-entry.scores, kind="stable"):
        candidates = np.where(free, iou[i], -1)
        if len(candidates) and candidates.max() >= threshold:
            found[i] = candidates.argmax()
            free[found[i]] = False
        elif (iou[i][entry.crowd] >= threshold).any():
            found[i] = -2
    return found


def image_confusion(entries: Sequence[ImageEntry], num_classes: int) -> np.ndarray:
    """Count true class against the class of the best-scoring detection.

    Args:
        entries: images; those whose ground truth has not exactly one class are left out.
        num_classes: K.

    Returns:
        (K, K + 1) int; the last column counts images in which nothing was found.
    """
    table = np.zeros((num_classes, num_classes + 1), np.int64)
    for entry in entries:
        present = np.unique(entry.gt_classes)
        if len(present) == 1:
            best = entry.classes[entry.scores.argmax()] if len(entry.scores) else num_classes
            table[present[0], best] += 1
    return table


def instance_confusion(
    entries: Sequence[ImageEntry], num_classes: int, iou: float, score: float
) -> np.ndarray:
    """Count true against predicted class of matched instances.

    Args:
        entries: images.
        num_classes: K.
        iou: least IoU of a match, whatever the classes.
        score: detections below it are left out.

    Returns:
        (K + 1, K + 1) int; last row: detections of nothing; last column: missed instances.
    """
    table = np.zeros((num_classes + 1, num_classes + 1), np.int64)
    for entry in entries:
        kept = entry.scores >= score
        part = ImageEntry(
            entry.gt_boxes,
            entry.gt_classes,
            entry.crowd,
            entry.boxes[kept],
            entry.scores[kept],
            entry.classes[kept],
        )
        found = match(part, iou, by_class=False)
        for predicted, index in zip(part.classes, found, strict=True):
            if index != -2:
                table[entry.gt_classes[index] if index >= 0 else num_classes, predicted] += 1
        missed = ~entry.crowd
        missed[found[found >= 0]] = False
        np.add.at(table[:, num_classes], entry.gt_classes[missed], 1)
    return table


def rates(table: np.ndarray, num_classes: int) -> dict[str, np.ndarray]:
    """Return per class precision, recall, F1 and accuracy (one class against the rest).

    Args:
        table: (K or K + 1, K + 1) counts of truth (rows) against prediction (columns).
        num_classes: K.

    Returns:
        Name -> (K,) in [0, 1]; NaN where nothing defines it (no such truth: recall and F1; nothing
        predicted so: precision).
    """
    hits = np.diag(table)[:num_classes].astype(float)
    truths = table[:num_classes].sum(1)
    predicted = table[:, :num_classes].sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision, recall = hits / predicted, hits / truths
        f1 = np.where(truths > 0, 2 * hits / (truths + predicted), np.nan)
        accuracy = (table.sum() - truths - predicted + 2 * hits) / table.sum()
    return {"precision": precision, "recall": recall, "F1": f1, "accuracy": accuracy}


def best_thresholds(
    entries: Sequence[ImageEntry], num_classes: int, iou: float
) -> list[dict[str, float]]:
    """Return for each class the score at which F1 is highest.

    Args:
        entries: images.
        num_classes: K.
        iou: least IoU of a match with a ground truth of the class.

    Returns:
        Per class ``{"threshold", "precision", "recall", "F1"}``; NaN where the class has no ground
        truth or no detection.
    """
    matched = [match(entry, iou, by_class=True) for entry in entries]
    nothing = {"threshold": np.nan, "precision": np.nan, "recall": np.nan, "F1": np.nan}
    result = []
    for k in range(num_classes):
        truths = sum(int(((e.gt_classes == k) & ~e.crowd).sum()) for e in entries)
        pairs = [
            (score, index >= 0)
            for e, found in zip(entries, matched, strict=True)
            for score, c, index in zip(e.scores, e.classes, found, strict=True)
            if c == k and index != -2
        ]
        if not truths or not pairs:
            result.append(dict(nothing))
            continue
        data = np.array(sorted(pairs, reverse=True), dtype=float)
        hits = data[:, 1].cumsum()
        count = np.arange(1, len(data) + 1)
        last = np.append(data[1:, 0] != data[:-1, 0], True)  # a tie is kept or dropped as a whole
        f1 = np.where(last, 2 * hits / (truths + count), -1)
        i = int(f1.argmax())
        result.append(
            {
                "threshold": data[i, 0],
                "precision": hits[i] / count[i],
                "recall": hits[i] / truths,
                "F1": f1[i],
            }
        )
    return result


logger = logging.getLogger(__name__)


class ClassificationReport(DatasetEvaluator):
    """Precision, recall, F1, accuracy and confusion of the classes of a detection dataset.

    Two views. *Image*: the class of the best-scoring detection against the image's class, for
    images whose ground truth has one class. *Instance*: detections matched to ground truths by IoU,
    best score first.

    Args:
        dataset_name: registered dataset with `thing_classes` and boxes.
        output_dir: where ``classification_report.json`` and ``confusion.png`` go; None: nowhere.
        iou_threshold: least IoU of a match, in (0, 1].
        score_threshold: detections below it do not count in the instances' confusion, in [0, 1].
        distributed: gather from all processes.

    Raises:
        ValueError: if the dataset names no classes.
    """

    def __init__(
        self,
        dataset_name: str,
        *,
        output_dir: str | None = None,
        iou_threshold: float = 0.5,
        score_threshold: float = 0.5,
        distributed: bool = True,
    ) -> None:
        names = MetadataCatalog.get(dataset_name).get("thing_classes")
        if not names:
            raise ValueError(
                f"ClassificationReport: dataset '{dataset_name}' has no thing_classes; set them "
                "with MetadataCatalog.get(name).set(thing_classes=[...])"
            )
        self._dataset_name = dataset_name
        self._names = list(names)
        self._output_dir = output_dir
        self._iou = iou_threshold
        self._score = score_threshold
        self._distributed = distributed
        self.reset()

    @property
    def accepts_roi_masks(self) -> bool:
        """True: masks are not looked at."""
        return True

    def reset(self) -> None:
        """Forget all predictions."""
        self._predictions: list[dict[str, Any]] = []

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Any]) -> None:
        """Take in one batch: per image ``image_id``, and ``instances`` with boxes and scores."""
        for image, output in zip(inputs, outputs, strict=True):
            found = output["instances"].to("cpu")
            self._predictions.append(
                {
                    "image_id": image["image_id"],
                    "boxes": found.pred_boxes.tensor.numpy().astype(np.float64),
                    "scores": found.scores.numpy().astype(np.float64),
                    "classes": found.pred_classes.numpy(),
                }
            )

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Compute the report.

        Returns:
            ``{"class_by_image": {...}, "class_by_instance": {...}}`` in percent: ``accuracy`` (of
            all images; of all matched, missed and wrong instances), the classes' mean
            ``precision``, ``recall``, ``F1``, and ``F1-<class>``; nan where nothing defines a
            figure. Empty on other processes than the main one.
        """
        parts = gather_on_main(self._predictions, self._distributed)
        if not parts:
            return {}
        entries = self._entries(once_per_image(parts))
        count = len(self._names)
        tables = {
            "image": image_confusion(entries, count),
            "instance": instance_confusion(entries, count, self._iou, self._score),
        }
        thresholds = best_thresholds(entries, count, self._iou)
        per_class = {view: rates(table, count) for view, table in tables.items()}
        left_out = len(entries) - int(tables["image"].sum())
        self._log(tables, per_class, thresholds, left_out)
        if self._output_dir:
            self._write(Path(self._output_dir), tables, per_class, thresholds)
        return OrderedDict(
            (f"class_by_{view}", self._summary(tables[view], per_class[view])) for view in tables
        )

    def _entries(self, predictions: list[dict[str, Any]]) -> list[ImageEntry]:
        """Join predictions and ground truth by image id."""
        records = {r["image_id"]: r for r in DatasetCatalog.get(self._dataset_name)}
        unknown = [p["image_id"] for p in predictions if p["image_id"] not in records]
        if unknown:
            raise ValueError(
                f"ClassificationReport: image id {unknown[0]!r} is not in dataset "
                f"'{self._dataset_name}': was the loader built for another one?"
            )
        entries = []
        for prediction in predictions:
            truth = records[prediction["image_id"]].get("annotations", [])
            boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in truth]
            entries.append(
                ImageEntry(
                    np.array(boxes, np.float64).reshape(-1, 4),
                    np.array([a["category_id"] for a in truth], np.int64),
                    np.array([bool(a.get("iscrowd", 0)) for a in truth], bool),
                    prediction["boxes"],
                    prediction["scores"],
                    prediction["classes"],
                )
            )
        return entries

    def _summary(self, table: np.ndarray, values: dict[str, np.ndarray]) -> dict[str, float]:
        total = int(table.sum())
        summary = {"accuracy": 100 * np.trace(table) / total if total else math.nan}
        for name in ("precision", "recall", "F1"):
            known = values[name][np.isfinite(values[name])]
            summary[name] = 100 * float(known.mean()) if len(known) else math.nan
        summary |= {
            f"F1-{c}": 100 * float(v) for c, v in zip(self._names, values["F1"], strict=True)
        }
        return {name: float(value) for name, value in summary.items()}

    def _log(
        self,
        tables: dict[str, np.ndarray],
        per_class: dict[str, dict[str, np.ndarray]],
        thresholds: list[dict[str, float]],
        left_out: int,
    ) -> None:
        for view, table in tables.items():
            values = per_class[view]
            rows = [
                [name, *(100 * values[key][i] for key in values), int(table[i].sum())]
                for i, name in enumerate(self._names)
            ]
            means = [
                100 * np.nanmean(v) if np.isfinite(v).any() else math.nan for v in values.values()
            ]
            rows.append(["mean", *means, int(table[: len(self._names)].sum())])
            text = tabulate(rows, ["class", *values, "number"], floatfmt=".1f", tablefmt="github")
            logger.info("Classification by %s:\n%s\n%s", view, text, self._confusion_text(table))
        if left_out:
            logger.info("%d images have no class or several: not in the view by image", left_out)
        rows = [
            [name, *(t[key] for key in ("threshold", "precision", "recall", "F1"))]
            for name, t in zip(self._names, thresholds, strict=True)
        ]
        head = ["class", "best threshold", "precision", "recall", "F1"]
        logger.info(
            "Score at which F1 is highest (IoU %.2f):\n%s",
            self._iou,
            tabulate(rows, head, floatfmt=".3f", tablefmt="github"),
        )

    def _labels(self, table: np.ndarray) -> tuple[list[str], list[str]]:
        """Return the names of the rows and of the columns of a confusion."""
        rows = [*self._names, "background"][: len(table)]
        return rows, [*self._names, "nothing found" if len(table) == len(self._names) else "missed"]

    def _confusion_text(self, table: np.ndarray) -> str:
        rows, columns = self._labels(table)
        lines = [[name, *line.tolist()] for name, line in zip(rows, table, strict=True)]
        return tabulate(lines, ["truth \\ found", *columns], tablefmt="github")

    def _write(
        self,
        folder: Path,
        tables: dict[str, np.ndarray],
        per_class: dict[str, dict[str, np.ndarray]],
        thresholds: list[dict[str, float]],
    ) -> None:
        from d2kit.visualization.plots import plot_confusion

        os.makedirs(folder, exist_ok=True)
        content: dict[str, Any] = {
            "classes": self._names,
            "iou_threshold": self._iou,
            "score_threshold": self._score,
            "best_thresholds": {
                name: {k: _json_number(v) for k, v in t.items()}
                for name, t in zip(self._names, thresholds, strict=True)
            },
        }
        for view, table in tables.items():
            figures = {k: [_json_number(x) for x in v] for k, v in per_class[view].items()}
            content[view] = {"confusion": table.tolist(), **figures}
        name, picture = self._dataset_name, "confusion.png"
        with results_file(folder, "classification_report.json", name, beside=[picture]) as f:
            json.dump(content, f, indent=1, allow_nan=False)
        panels = {f"by {view}": (table, *self._labels(table)) for view, table in tables.items()}
        plot_confusion(panels, folder / picture)
        logger.info("Wrote classification_report.json and confusion.png to %s", folder)


def _json_number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
