"""Trackers that choose all pairs of a frame at once."""

from __future__ import annotations

import numpy as np

from d2kit.structures import Instances
from d2kit.tracking.motion_trackers import OverlapTracker, overlap

__all__ = ["BaseHungarianTracker"]


class BaseHungarianTracker(OverlapTracker):
    """Chooses the pairs of detections and objects with the least sum of costs.

    A subclass says what a pair costs (`build_cost_matrix`). Every detection is paired while there
    are objects, however bad the pair: `min_match_iou` forbids pairs that hardly overlap.

    Args: those of `OverlapTracker`.

    Source: Kuhn 1955, "The Hungarian method for the assignment problem".
    """

    def build_cost_matrix(self, instances: Instances, prev_instances: Instances) -> np.ndarray:
        """Return the cost of every pair.

        Args:
            instances: R detections of this frame, best score first.
            prev_instances: P objects of the previous frame, with `ID`, `ID_period` and
                `lost_frame_count`.

        Returns:
            (R, P) float; lower is better.

        Raises:
            NotImplementedError: unless a subclass says it.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement build_cost_matrix")

    def _pairs(self, instances: Instances, previous: Instances) -> list[tuple[int, int]]:
        from scipy.optimize import linear_sum_assignment

        rows, columns = linear_sum_assignment(self.build_cost_matrix(instances, previous))
        if self._min_match_iou > 0:
            near = overlap(instances, previous, self._association)[rows, columns]
            enough = near >= self._min_match_iou
            rows, columns = rows[enough], columns[enough]
        return list(zip(rows.tolist(), columns.tolist(), strict=True))
