"""The simplest tracker: whoever overlaps most is the same object."""

from __future__ import annotations

from typing import Any

import numpy as np

from d2kit.structures import Instances
from d2kit.tracking.base_tracker import TRACKER_HEADS_REGISTRY
from d2kit.tracking.motion_trackers import OverlapTracker, overlap
from d2kit.tracking.utils import create_prediction_pairs

__all__ = ["BBoxIOUTracker"]


@TRACKER_HEADS_REGISTRY.register()
class BBoxIOUTracker(OverlapTracker):
    """Pairs the detections with the objects of the previous frame greedily, best overlap first.

    Args: those of `OverlapTracker`; `min_match_iou` has no effect.

    Source: Bochinski et al. 2017, "High-speed tracking-by-detection without using image
    information", section 3.
    """

    def _process_unmatched_idx(self, instances: Instances, matched_idx: np.ndarray) -> Instances:
        return self._assign_new_id(instances)

    def _assign_new_id(self, instances: Instances) -> Instances:
        """Number the detections that are in no pair, in place; user classes override it."""
        matched = np.array(sorted(self._matched_idx), dtype=np.int64)
        return super()._process_unmatched_idx(instances, matched)

    def _process_unmatched_prev_idx(
        self, instances: Instances, matched_prev_idx: np.ndarray
    ) -> Instances:
        return self._merge_untracked_instances(instances)

    def _merge_untracked_instances(self, instances: Instances) -> Instances:
        """Join this frame's objects and the lost ones; user classes override it."""
        before = 0 if self._prev_instances is None else len(self._prev_instances)
        found = np.array(sorted(set(range(before)) - self._untracked_prev_idx), dtype=np.int64)
        return super()._process_unmatched_prev_idx(instances, found)

    def _create_prediction_pairs(
        self, instances: Instances, iou_all: np.ndarray
    ) -> list[dict[str, Any]]:
        """Return the pairs that overlap enough, see `create_prediction_pairs`."""
        previous: Any = self._prev_instances
        return create_prediction_pairs(instances, previous, iou_all, self._track_iou_threshold)

    def _pairs(self, instances: Instances, previous: Instances) -> list[tuple[int, int]]:
        iou = overlap(instances, previous, self._association)
        candidates = self._create_prediction_pairs(instances, iou)
        candidates.sort(key=lambda pair: -pair["IoU"])
        chosen: list[tuple[int, int]] = []
        rows, columns = set(), set()
        for pair in candidates:
            if pair["idx"] not in rows and pair["prev_idx"] not in columns:
                rows.add(pair["idx"])
                columns.add(pair["prev_idx"])
                chosen.append((pair["idx"], pair["prev_idx"]))
        return chosen
