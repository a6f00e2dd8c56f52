"""The assignment with the largest sum of overlaps."""

from __future__ import annotations

from typing import Any

import numpy as np

from d2kit.tracking.base_tracker import TRACKER_HEADS_REGISTRY
from d2kit.tracking.vanilla_hungarian_bbox_iou_tracker import VanillaHungarianBBoxIOUTracker

__all__ = ["IOUWeightedHungarianBBoxIOUTracker"]


@TRACKER_HEADS_REGISTRY.register()
class IOUWeightedHungarianBBoxIOUTracker(VanillaHungarianBBoxIOUTracker):
    """Hungarian tracker in which a good pair is worth its overlap.

    Args: those of `VanillaHungarianBBoxIOUTracker`.
    """

    def assign_cost_matrix_values(
        self, cost_matrix: np.ndarray, bbox_pairs: list[dict[str, Any]]
    ) -> np.ndarray:
        """Write the cost of the good pairs, minus their overlap, in place; return the matrix."""
        for pair in bbox_pairs:
            cost_matrix[pair["idx"], pair["prev_idx"]] = -pair["IoU"]
        return cost_matrix
