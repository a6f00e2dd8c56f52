"""The simplest tracker: whoever overlaps most is the same object."""

from __future__ import annotations

from d2kit.structures import Instances
from d2kit.tracking.base_tracker import TRACKER_HEADS_REGISTRY
from d2kit.tracking.memory import OverlapTracker, overlap
from d2kit.tracking.utils import create_prediction_pairs

__all__ = ["BBoxIOUTracker"]


@TRACKER_HEADS_REGISTRY.register()
class BBoxIOUTracker(OverlapTracker):
    """Pairs the detections with the objects of the previous frame greedily, best overlap first.

    Args: those of `OverlapTracker`; `min_match_iou` has no effect.

    Source: Bochinski et al. 2017, "High-speed tracking-by-detection without using image
    information", section 3.
    """

    def _pairs(self, instances: Instances, previous: Instances) -> list[tuple[int, int]]:
        iou = overlap(instances, previous, self._association)
        candidates = create_prediction_pairs(instances, previous, iou, self._track_iou_threshold)
        candidates.sort(key=lambda pair: -pair["IoU"])
        chosen: list[tuple[int, int]] = []
        rows, columns = set(), set()
        for pair in candidates:
            if pair["idx"] not in rows and pair["prev_idx"] not in columns:
                rows.add(pair["idx"])
                columns.add(pair["prev_idx"])
                chosen.append((pair["idx"], pair["prev_idx"]))
        return chosen
