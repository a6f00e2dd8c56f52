"""Detectron2's trackers, the simple ones, by overlap; and tracks without gaps and flickers."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable
from typing import Any, Generic, TypeVar

import numpy as np

from d2kit.structures import Instances
from d2kit.tracking.motion_trackers import TRACKER_HEADS_REGISTRY, OverlapTracker, overlap

LARGE_COST_VALUE = 100000
"""Cost of a pair that overlaps too little; any pair that overlaps enough is cheaper."""


def create_prediction_pairs(
    instances: Instances,
    prev_instances: Instances,
    iou_all: np.ndarray,
    threshold: float = 0.5,
) -> list[dict[str, Any]]:
    """List the pairs of a detection and an object of the previous frame that overlap enough.

    Args:
        instances: R detections of this frame.
        prev_instances: P objects of the previous frame with `ID` and `ID_period`.
        iou_all: (R, P) overlap in [0, 1].
        threshold: least overlap of a pair.

    Returns:
        Dicts with ``idx`` and ``prev_idx`` (row in either argument), ``prev_id``, ``IoU`` and
        ``prev_period`` (frames in which the object has been seen), in order of the rows.
    """
    return [
        {
            "idx": int(row),
            "prev_idx": int(column),
            "prev_id": prev_instances.ID[column],
            "IoU": float(iou_all[row, column]),
            "prev_period": prev_instances.ID_period[column],
        }
        for row, column in np.argwhere(np.asarray(iou_all) >= threshold)
    ]


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


Frame = TypeVar("Frame")


@dataclasses.dataclass(frozen=True)
class Sighting:
    """One object in one frame.

    Attributes:
        track_id: its identity.
        class_id: contiguous class index.
        score: confidence in [0, 1].
        box: x0, y0, x1, y1 in pixels.
        centroid: x, y of the mask, of the box where there is no mask, pixels.
        area: of the mask, pixels; None without one.
        mask: the mask in whatever form; None without one.
        interpolated: not detected: put between two detections.
    """

    track_id: int
    class_id: int
    score: float
    box: tuple[float, float, float, float]
    centroid: tuple[float, float]
    area: int | None = None
    mask: Any = None
    interpolated: bool = False


class TrackSmoother(Generic[Frame]):
    """Fills short gaps of tracks and leaves out short tracks, on a stream.

    Frames come out in order, `delay` frames after they went in. An object is reported from its
    first frame on if it is found in `min_track_length` frames within the delay; what is confirmed
    later is reported from then on.

    Args:
        fill_gap: longest gap, in frames, that is filled; 0: none.
        min_track_length: number of detections that make a track.

    Raises:
        ValueError: if a number is outside of its range.
    """

    def __init__(self, *, fill_gap: int = 0, min_track_length: int = 1) -> None:
        if fill_gap < 0 or min_track_length < 1:
            raise ValueError(
                "TRACKER_HEADS.FILL_GAP must be at least 0 and MIN_TRACK_LENGTH at least 1, got "
                f"{fill_gap} and {min_track_length}"
            )
        self.fill_gap = fill_gap
        self.min_track_length = min_track_length
        self.delay = fill_gap + min_track_length - 1
        self._frames: deque[tuple[Frame, list[Sighting]]] = deque()
        self._pushed = 0
        self._last: dict[int, tuple[int, Sighting]] = {}  # of the tracks that a gap may still join
        self._counts: dict[int, int] = {}

    def push(
        self, frame: Frame, sightings: Iterable[Sighting]
    ) -> list[tuple[Frame, list[Sighting]]]:
        """Take the next frame.

        Args:
            frame: anything; comes out with its sightings.
            sightings: the objects in it, at most one per identity.

        Returns:
            The frames that are finished now: none or one.
        """
        here = list(sightings)
        self._frames.append((frame, here))
        for sighting in here:
            self._fill(sighting)
            self._last[sighting.track_id] = (self._pushed, sighting)
            self._counts[sighting.track_id] = self._counts.get(sighting.track_id, 0) + 1
        self._pushed += 1
        horizon = self._pushed - 1 - self.fill_gap
        self._last = {k: v for k, v in self._last.items() if v[0] >= horizon}
        return [self._pop()] if len(self._frames) > self.delay else []

    def flush(self) -> list[tuple[Frame, list[Sighting]]]:
        """Return the frames that are still inside, at the end of the video."""
        return [self._pop() for _ in range(len(self._frames))]

    def _pop(self) -> tuple[Frame, list[Sighting]]:
        frame, sightings = self._frames.popleft()
        least = self.min_track_length
        kept = [s for s in sightings if self._counts[s.track_id] >= least]
        return frame, sorted(kept, key=lambda s: s.track_id)

    def _fill(self, sighting: Sighting) -> None:
        """Put the object into the frames between its last sighting and this one."""
        ordinal, before = self._last.get(sighting.track_id, (self._pushed - 1, sighting))
        missing = self._pushed - ordinal - 1
        if not 0 < missing <= self.fill_gap:
            return
        for step in range(1, missing + 1):
            made = _between(before, sighting, step / (missing + 1))
            self._frames[step - missing - 2][1].append(made)


def _between(first: Sighting, second: Sighting, share: float) -> Sighting:
    """Return the sighting at `share` in (0, 1) of the way between two."""

    def mix(a: Any, b: Any) -> tuple[float, ...]:
        return tuple(x + share * (y - x) for x, y in zip(a, b, strict=True))

    return Sighting(
        track_id=first.track_id,
        class_id=first.class_id,
        score=min(first.score, second.score),
        box=mix(first.box, second.box),  # type: ignore[arg-type]
        centroid=mix(first.centroid, second.centroid),  # type: ignore[arg-type]
        interpolated=True,
    )
