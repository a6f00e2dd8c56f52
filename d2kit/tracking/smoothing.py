"""Tracks without short gaps and without flickers, a few frames later."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable
from typing import Any, Generic, TypeVar

__all__ = ["Sighting", "TrackSmoother"]

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
