"""COCO's AP once more, in loops, for any overlap: what our evaluators are held to."""

import math

import numpy as np

IOUS = [0.5 + 0.05 * i for i in range(10)]
RECALLS = np.linspace(0, 1, 101)
AREAS = {"AP": (0, 1e10), "APs": (0, 32**2), "APm": (32**2, 96**2), "APl": (96**2, 1e10)}
LIMIT = 100


def match(truths, rows, iou, low, high, overlap, area_of):
    """Scores of detections with whether they are right; and the number of ground truths.

    Args:
        truths: (box, crowd) of one image and class.
        rows: (box, score), best first.
    """
    ignored = [crowd or not low <= area_of(box) <= high for box, crowd in truths]
    order = sorted(range(len(truths)), key=lambda g: ignored[g])
    taken: set[int] = set()
    marks = []
    for box, score in rows:
        best, value = None, min(iou, 1 - 1e-10)
        for g in order:
            truth, crowd = truths[g]
            if g in taken and not crowd:
                continue
            if best is not None and not ignored[best] and ignored[g]:
                break
            here = overlap(box, truth, crowd)
            if here >= value:
                best, value = g, here
        if best is None:
            if low <= area_of(box) <= high:
                marks.append((score, False))
        else:
            taken.add(best)
            if not ignored[best]:
                marks.append((score, True))
    return marks, ignored.count(False)


def interpolated(marks, positives):
    """Average precision at 101 recalls of (score, right), in the order of the images."""
    marks = sorted(marks, key=lambda mark: -mark[0])
    right = np.cumsum([hit for _, hit in marks])
    precision = right / np.arange(1, len(marks) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(right / positives, RECALLS, side="left")
    return float(np.mean([precision[p] if p < len(marks) else 0.0 for p in places]))


def average_precision(truths, found, classes, overlap, area_of):
    """Return AP, AP50, AP75, APs, APm and APl in percent.

    Args:
        truths: image -> (box, class, crowd).
        found: image -> (box, score, class).
        classes: how many.
        overlap: (detected box, true box, crowd) -> IoU, or share of the detection for crowds.
        area_of: of a box.
    """

    def figure(iou, area):
        values = []
        for c in range(classes):
            marks, positives = [], 0
            for image, here in truths.items():
                rows = [(b, s) for b, s, k in found.get(image, []) if k == c]
                rows = sorted(rows, key=lambda row: -row[1])[:LIMIT]
                own = [(b, crowd) for b, k, crowd in here if k == c]
                more, count = match(own, rows, iou, *AREAS[area], overlap, area_of)
                marks += more
                positives += count
            if positives:
                values.append(interpolated(marks, positives))
        return 100 * float(np.mean(values)) if values else math.nan

    result = {area: float(np.mean([figure(iou, area) for iou in IOUS])) for area in AREAS}
    return {**result, "AP50": figure(0.5, "AP"), "AP75": figure(0.75, "AP")}
