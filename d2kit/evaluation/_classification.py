"""Numbers of a classification report: confusion, precision, recall, F1, best thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


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
    return shared / np.maximum(union, 1e-9)


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
