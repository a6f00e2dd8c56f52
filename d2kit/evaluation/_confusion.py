"""Counting label images against each other: confusion matrices and what follows from them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BOUNDARY_RATIO = 0.02
"""Width of a boundary, relative to the diagonal of the image."""


def confusion(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Count pixels.

    Args:
        truth: (H, W) labels; pixels with other values than 0 ... classes - 1 are left out.
        predicted: (H, W) labels; other values are counted in the last column.
        classes: K.

    Returns:
        (K, K + 1) int64: pixels by true and predicted class.
    """
    truth, predicted = truth.ravel().astype(np.int64), predicted.ravel().astype(np.int64)
    known = (truth >= 0) & (truth < classes)
    truth, predicted = truth[known], predicted[known]
    predicted = np.where((predicted >= 0) & (predicted < classes), predicted, classes)
    counts = np.bincount(truth * (classes + 1) + predicted, minlength=classes * (classes + 1))
    return counts.reshape(classes, classes + 1)


def is_boundary(labels: np.ndarray) -> np.ndarray:
    """Mark the pixels that lie within the boundary of their own segment.

    Args:
        labels: (H, W) integers below 2**16.

    Returns:
        (H, W) bool: whether another label, or the border of the image, is within d pixels along
        both axes; d is `BOUNDARY_RATIO` of the diagonal, at least 1. For each class these are the
        pixels that d erosions of its mask by 3 x 3 remove.

    Source: Cheng et al., "Boundary IoU", 2021, section 4 (arXiv 2103.16562).
    """
    import cv2

    height, width = labels.shape
    reach = max(1, round(BOUNDARY_RATIO * float(np.hypot(height, width))))
    window = np.ones((2 * reach + 1, 2 * reach + 1), np.uint8)
    # 1 more than the labels, so that the 0 of the border differs from all of them
    padded = np.pad(labels.astype(np.int32) + 1, 1).astype(np.uint16)
    highest = cv2.dilate(padded, window, borderType=cv2.BORDER_REPLICATE)
    lowest = cv2.erode(padded, window, borderType=cv2.BORDER_REPLICATE)
    return np.asarray(highest != lowest)[1:-1, 1:-1]


def boundary_iou_counts(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Count the pixels of boundaries.

    Args:
        truth: (H, W) labels, as for `confusion`.
        predicted: (H, W) labels.
        classes: K.

    Returns:
        (2, K) int64: per class the pixels in both boundaries, and in one of them at least.
    """
    known = (truth >= 0) & (truth < classes)
    of_truth = np.where(is_boundary(truth), truth, classes)[known].astype(np.int64)
    of_predicted = np.where(is_boundary(predicted), predicted, classes)[known].astype(np.int64)
    of_predicted = of_predicted.clip(0, classes)
    shared = np.bincount(of_truth[of_truth == of_predicted], minlength=classes + 1)
    either = np.bincount(of_truth, minlength=classes + 1) + np.bincount(
        of_predicted, minlength=classes + 1
    )
    return np.stack([shared, either - shared])[:, :classes]


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Divide; nan where the whole is 0."""
    part, whole = np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    return np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)


def mean_of_defined(values: np.ndarray | Sequence[float]) -> float:
    """Mean of what is not nan; nan where all are."""
    values = np.asarray(values, dtype=np.float64)
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else float("nan")
