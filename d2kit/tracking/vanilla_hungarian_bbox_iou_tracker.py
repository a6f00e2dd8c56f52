"""The assignment with the most pairs that overlap enough."""

from __future__ import annotations

from typing import Any

import numpy as np

from d2kit.structures import Instances
from d2kit.tracking.base_tracker import TRACKER_HEADS_REGISTRY
from d2kit.tracking.hungarian_tracker import BaseHungarianTracker
from d2kit.tracking.motion_trackers import overlap
from d2kit.tracking.utils import LARGE_COST_VALUE, create_prediction_pairs

__all__ = ["VanillaHungarianBBoxIOUTracker"]

_TIE = 1e-6  # of the overlap: decides between assignments that cost the same, and nothing else


@TRACKER_HEADS_REGISTRY.register()
class VanillaHungarianBBoxIOUTracker(BaseHungarianTracker):
    """Hungarian tracker in which all pairs above a threshold of overlap cost the same.

    Args: those of `OverlapTracker`.
    """

    def build_cost_matrix(self, instances: Instances, prev_instances: Instances) -> np.ndarray:
        """Return (R, P) costs: those of `assign_cost_matrix_values`, else `LARGE_COST_VALUE`.

        A millionth of the overlap is taken off, so that of equally cheap assignments the one with
        more overlap is chosen, whatever the order of the rows.
        """
        iou = overlap(instances, prev_instances, self._association)
        pairs = create_prediction_pairs(instances, prev_instances, iou, self._track_iou_threshold)
        cost = np.full(iou.shape, float(LARGE_COST_VALUE))
        return self.assign_cost_matrix_values(cost, pairs) - _TIE * iou

    def assign_cost_matrix_values(
        self, cost_matrix: np.ndarray, bbox_pairs: list[dict[str, Any]]
    ) -> np.ndarray:
        """Write the cost of the good pairs.

        Args:
            cost_matrix: (R, P), changed in place.
            bbox_pairs: the pairs, see `create_prediction_pairs`.

        Returns:
            `cost_matrix`, with -1 at the pairs.
        """
        for pair in bbox_pairs:
            cost_matrix[pair["idx"], pair["prev_idx"]] = -1.0
        return cost_matrix
