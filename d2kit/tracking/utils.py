"""Pairs of detections that may be the same object."""

from __future__ import annotations

from typing import Any

import numpy as np

from d2kit.structures import Instances

__all__ = ["LARGE_COST_VALUE", "create_prediction_pairs"]

LARGE_COST_VALUE = 100000
"""Cost of a pair that overlaps too little; any pair that overlaps enough is cheaper."""


def create_prediction_pairs(
    instances: Instances,
    prev_instances: Instances,
    iou_all: np.ndarray,
    threshold: float = 0.5,
) -> list[dict[str, Any]]:
    """List the pairs of a detection and an object of the previous frame that overlap enough.

    Args:
        instances: R detections of this frame.
        prev_instances: P objects of the previous frame with `ID` and `ID_period`.
        iou_all: (R, P) overlap in [0, 1].
        threshold: least overlap of a pair.

    Returns:
        Dicts with ``idx`` and ``prev_idx`` (row in either argument), ``prev_id``, ``IoU`` and
        ``prev_period`` (frames in which the object has been seen), in order of the rows.
    """
    return [
        {
            "idx": int(row),
            "prev_idx": int(column),
            "prev_id": prev_instances.ID[column],
            "IoU": float(iou_all[row, column]),
            "prev_period": prev_instances.ID_period[column],
        }
        for row, column in np.argwhere(np.asarray(iou_all) >= threshold)
    ]
