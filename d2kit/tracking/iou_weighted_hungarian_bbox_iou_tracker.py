"""The assignment with the largest sum of overlaps."""

from __future__ import annotations

from typing import Any

import numpy as np

from d2kit.config import CfgNode, configurable
from d2kit.tracking._memory import build_overlap_arguments
from d2kit.tracking.base_tracker import TRACKER_HEADS_REGISTRY
from d2kit.tracking.vanilla_hungarian_bbox_iou_tracker import VanillaHungarianBBoxIOUTracker

__all__ = ["IOUWeightedHungarianBBoxIOUTracker"]


@TRACKER_HEADS_REGISTRY.register()
class IOUWeightedHungarianBBoxIOUTracker(VanillaHungarianBBoxIOUTracker):
    """Hungarian tracker in which a good pair is worth its overlap.

    Args:
        video_height, video_width, max_num_instances, max_lost_frame_count, min_box_rel_dim,
            min_instance_period: see `OverlapTracker`.
        track_iou_threshold: least overlap of a good pair.
        **kwargs: `association` and `min_match_iou`, see `OverlapTracker`; others are ignored.
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

    def assign_cost_matrix_values(
        self, cost_matrix: np.ndarray, bbox_pairs: list[dict[str, Any]]
    ) -> np.ndarray:
        """Write the cost of the good pairs, minus their overlap, in place; return the matrix."""
        for pair in bbox_pairs:
            cost_matrix[pair["idx"], pair["prev_idx"]] = -pair["IoU"]
        return cost_matrix
