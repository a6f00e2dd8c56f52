"""Trackers: the detections of one frame after another get identities.

`build_tracker_head(cfg)` makes the tracker that ``cfg.TRACKER_HEADS.TRACKER_NAME`` names; its
`update` takes the detections of a frame and returns them with the field `ID`.
"""

from d2kit.tracking.base_tracker import TRACKER_HEADS_REGISTRY, BaseTracker, build_tracker_head
from d2kit.tracking.bbox_iou_tracker import BBoxIOUTracker
from d2kit.tracking.hungarian_tracker import BaseHungarianTracker
from d2kit.tracking.iou_weighted_hungarian_bbox_iou_tracker import (
    IOUWeightedHungarianBBoxIOUTracker,
)
from d2kit.tracking.motion_trackers import OCSORT, BoTSORT, ByteTrack
from d2kit.tracking.smoothing import Sighting, TrackSmoother
from d2kit.tracking.utils import create_prediction_pairs
from d2kit.tracking.vanilla_hungarian_bbox_iou_tracker import VanillaHungarianBBoxIOUTracker

__all__ = [
    "OCSORT",
    "TRACKER_HEADS_REGISTRY",
    "BBoxIOUTracker",
    "BaseHungarianTracker",
    "BaseTracker",
    "BoTSORT",
    "ByteTrack",
    "IOUWeightedHungarianBBoxIOUTracker",
    "Sighting",
    "TrackSmoother",
    "VanillaHungarianBBoxIOUTracker",
    "build_tracker_head",
    "create_prediction_pairs",
]
