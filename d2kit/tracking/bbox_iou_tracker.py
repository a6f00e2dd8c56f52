"""The simplest tracker: whoever overlaps most is the same object."""

from __future__ import annotations

from typing import Any

from d2kit.config import CfgNode, configurable
from d2kit.structures import Instances
from d2kit.tracking._memory import OverlapTracker, build_overlap_arguments
from d2kit.tracking._overlap import overlap
from d2kit.tracking.base_tracker import TRACKER_HEADS_REGISTRY
from d2kit.tracking.utils import create_prediction_pairs

__all__ = ["BBoxIOUTracker"]


@TRACKER_HEADS_REGISTRY.register()
class BBoxIOUTracker(OverlapTracker):
    """Pairs the detections with the objects of the previous frame greedily, best overlap first.

    Args:
        video_height, video_width, max_num_instances, max_lost_frame_count, min_box_rel_dim,
            min_instance_period: see `OverlapTracker`.
        track_iou_threshold: least overlap of a pair.
        **kwargs: `association`, see `OverlapTracker`; others are ignored.

    Source: Bochinski et al. 2017, "High-speed tracking-by-detection without using image
    information", section 3.
    """

    @configurable
    def __init__(  # noqa: D417 - listed together
        self,
        *,
        video_height: int,
        video_width: int,
        max_num_instances: int = 200,
        max_lost_frame_count: int = 0,
        min_box_rel_dim: float = 0.02,
        min_instance_period: int = 1,
        track_iou_threshold: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            video_height=video_height,
            video_width=video_width,
            max_num_instances=max_num_instances,
            max_lost_frame_count=max_lost_frame_count,
            min_box_rel_dim=min_box_rel_dim,
            min_instance_period=min_instance_period,
            track_iou_threshold=track_iou_threshold,
            **kwargs,
        )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Return the constructor's arguments, from ``cfg.TRACKER_HEADS``."""
        return build_overlap_arguments(cfg)

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
