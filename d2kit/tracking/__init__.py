"""Trackers: the detections of one frame after another get identities.

`build_tracker_head(cfg)` makes the tracker that ``cfg.TRACKER_HEADS.TRACKER_NAME`` names; its
`update` takes the detections of a frame and returns them with the field `ID`.
"""

from d2kit.tracking.motion_trackers import (
    OCSORT,
    TRACKER_HEADS_REGISTRY,
    BaseTracker,
    BoTSORT,
    ByteTrack,
    build_tracker_head,
)
from d2kit.tracking.trackers import (
    BaseHungarianTracker,
    BBoxIOUTracker,
    IOUWeightedHungarianBBoxIOUTracker,
    Sighting,
    TrackSmoother,
    VanillaHungarianBBoxIOUTracker,
    create_prediction_pairs,
)

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
