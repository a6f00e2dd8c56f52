"""From detections to tracks, frame by frame."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from d2kit.config import CfgNode
from d2kit.tracking import (
    TRACKER_HEADS_REGISTRY,
    BaseTracker,
    Sighting,
    TrackSmoother,
    build_tracker_head,
)
from d2kit.tracking.motion_trackers import MotionTracker
from d2kit.video.detections import FrameDetections
from d2kit.video.video_file import Frame

__all__ = [
    "TRACKERS",
    "Associator",
    "MaskPatch",
    "TrackedFrame",
    "build_associator",
    "patch_of",
    "start_score",
]

TRACKERS = {
    "bytetrack": "ByteTrack",
    "ocsort": "OCSORT",
    "botsort": "BoTSORT",
    "iou": "BBoxIOUTracker",
    "hungarian": "IOUWeightedHungarianBBoxIOUTracker",
}
"""Short names of the command line -> TRACKER_HEADS.TRACKER_NAME."""


@dataclasses.dataclass(frozen=True)
class MaskPatch:
    """The part of a frame that a mask covers.

    Attributes:
        x: left end, pixels.
        y: upper end, pixels.
        bits: (h, w) uint8, 1 inside.
        counts: the whole mask as compressed run lengths; empty where it has none.
    """

    x: int
    y: int
    bits: np.ndarray
    counts: str = ""


@dataclasses.dataclass(frozen=True)
class TrackedFrame:
    """A frame with its tracks.

    Attributes:
        frame: the picture.
        found: all its detections, tracked or not.
        sightings: its tracks in order of identity; their masks are `MaskPatch`.
        speeds: of each since its last sighting, in heights of a pixel per second: a step across is
            multiplied by the sample aspect ratio; None at the first.
    """

    frame: Frame
    found: FrameDetections
    sightings: list[Sighting]
    speeds: list[float | None]


class Associator:
    """Runs a tracker and the smoothing of its tracks over a stream.

    Args:
        tracker: see `d2kit.tracking`; new, at the first frame.
        smoother: see `TrackSmoother`; new.
        score_threshold: detections below are not tracked.
        size: (height, width) of the frames.
        aspect: width of a pixel over its height.
    """

    def __init__(
        self,
        tracker: BaseTracker,
        smoother: TrackSmoother[Any],
        *,
        score_threshold: float,
        size: tuple[int, int],
        aspect: float = 1.0,
    ) -> None:
        self._tracker, self._smoother = tracker, smoother
        self._least, self._size, self._aspect = score_threshold, size, aspect
        self._before: dict[int, tuple[float, tuple[float, float]]] = {}

    @property
    def delay(self) -> int:
        """Frames that are held back."""
        return self._smoother.delay

    @property
    def needs_image(self) -> bool:
        """Whether the tracker looks at the picture."""
        return bool(getattr(self._tracker, "uses_image", False))

    def push(self, frame: Frame, found: FrameDetections) -> list[TrackedFrame]:
        """Take the next frame; return those that are finished."""
        sure = found.chosen(self._least)
        image = {"image": frame.image} if self.needs_image and frame.image is not None else {}
        tracked = self._tracker.update(sure.instances(self._size), **image)
        sightings = [
            self._sighting(sure, row, identity + 1)
            for row, identity in enumerate(tracked.ID)
            if identity >= 0
        ]
        return [self._finish(*item) for item in self._smoother.push((frame, found), sightings)]

    def flush(self) -> list[TrackedFrame]:
        """Return the frames that are still inside, at the end of the video."""
        return [self._finish(*item) for item in self._smoother.flush()]

    def _sighting(self, found: FrameDetections, row: int, identity: int) -> Sighting:
        box = tuple(round(v, 2) for v in found.boxes[row].tolist())
        centroid, area, patch = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), None, None
        if found.masks is not None:
            patch = patch_of(found.masks[row], self._size)
            area = int(np.count_nonzero(patch.bits))
            centroid = _centroid(patch) if area else centroid
        return Sighting(
            track_id=identity,
            class_id=int(found.classes[row]),
            score=round(float(found.scores[row]), 4),
            box=box,  # type: ignore[arg-type]
            centroid=centroid,
            area=area,
            mask=patch,
        )

    def _finish(
        self, item: tuple[Frame, FrameDetections], sightings: list[Sighting]
    ) -> TrackedFrame:
        frame, found = item
        speeds: list[float | None] = []
        for sighting in sightings:
            before = self._before.get(sighting.track_id)
            elapsed = frame.time - before[0] if before else 0.0
            place = (sighting.centroid[0] * self._aspect, sighting.centroid[1])
            path = math.dist(before[1], place) if before else 0.0
            speeds.append(path / elapsed if elapsed > 0 else None)
            self._before[sighting.track_id] = (frame.time, place)
        return TrackedFrame(frame, found, sightings, speeds)


def patch_of(counts: str, size: tuple[int, int]) -> MaskPatch:
    """Decode a compressed run-length mask to the part of the frame that it covers."""
    from pycocotools import mask as mask_util

    rle: Any = {"size": list(size), "counts": counts}
    x, y, width, height = (int(v) for v in mask_util.toBbox(rle))
    whole = mask_util.decode(rle)
    bits = np.ascontiguousarray(whole[y : y + height, x : x + width])
    return MaskPatch(x, y, bits, counts)


def _centroid(patch: MaskPatch) -> tuple[float, float]:
    """Return the mean of the pixels' centres."""
    import cv2

    moments = cv2.moments(patch.bits, binaryImage=True)
    area = moments["m00"]
    return (
        patch.x + 0.5 + moments["m10"] / area,
        patch.y + 0.5 + moments["m01"] / area,
    )


def build_associator(cfg: CfgNode, size: tuple[int, int], aspect: float = 1.0) -> Associator:
    """Build what ``cfg.TRACKER_HEADS`` describes.

    Args:
        cfg: the config.
        size: (height, width) of the frames.
        aspect: width of a pixel over its height.

    Raises:
        ValueError: for a value that is out of range, by the name of its key.
    """
    cfg = cfg.clone()
    cfg.defrost()
    node = cfg.TRACKER_HEADS
    node.VIDEO_HEIGHT, node.VIDEO_WIDTH = size
    for key in ("SCORE_THRESH", "TRACK_IOU_THRESHOLD", "MIN_MATCH_IOU"):
        if not 0 <= node[key] <= 1:  # neither does nan lie there
            raise ValueError(f"TRACKER_HEADS.{key} must lie in [0, 1], got {node[key]}")
    smoother: TrackSmoother[Any] = TrackSmoother(
        fill_gap=node.FILL_GAP, min_track_length=node.MIN_TRACK_LENGTH
    )
    return Associator(
        build_tracker_head(cfg),
        smoother,
        score_threshold=node.SCORE_THRESH,
        size=size,
        aspect=aspect,
    )


def start_score(cfg: CfgNode) -> float:
    """Return the score that a detection needs for a new track, by ``cfg.TRACKER_HEADS``."""
    tracker = TRACKER_HEADS_REGISTRY.get(cfg.TRACKER_HEADS.TRACKER_NAME)
    least = float(cfg.TRACKER_HEADS.SCORE_THRESH)
    if not issubclass(tracker, MotionTracker):
        return least
    return float(max(least, tracker.start_score(tracker.from_config(cfg)["params"])))
