"""Frames and their detections, side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from d2kit.video.detections import DetectionStore, DetectionWriter, FrameDetections
from d2kit.video.frames import Frame
from d2kit.video.plan import VideoOptions

__all__ = ["DetectionFeed", "Pair"]

Pair = tuple[Frame, FrameDetections]


class DetectionFeed:
    """Brings frames and detections together: stored ones first, then the detector's.

    Args:
        options: of the run.
        store: the stored detections; None where there are none.
        writer: called before the first frame is detected: opens the store for more.
        detector: called at the same time: builds the detector.

    Attributes:
        stored: frames whose detections were read.
        detected: frames that went through the detector.
        problem: why the detections end before the frames.
    """

    def __init__(
        self,
        options: VideoOptions,
        store: DetectionStore | None,
        writer: Callable[[], DetectionWriter],
        detector: Callable[[], Any],
    ) -> None:
        self._options, self._store = options, store
        self._writer, self._detector = writer, detector
        self.stored, self.detected, self.problem = 0, 0, ""
        self.file: DetectionWriter | None = None

    def alone(self) -> Iterator[Pair]:
        """Yield the stored detections with frames that have no picture."""
        assert self._store is not None
        for found in self._store:
            self.stored += 1
            yield Frame(found.index, found.time, None), found
        self._note_cut()

    def join(self, frames: Iterable[Frame]) -> Iterator[Pair]:
        """Yield each frame with its detections."""
        earlier = iter(self._store) if self._store is not None else iter(())
        batch: list[Frame] = []
        reading, known = True, 0
        for frame in frames:
            found = next(earlier, None) if reading else None
            # Batches hold the frames that they would in an undisturbed run, those included whose
            # detections are known: the last digits of a frame's numbers may depend on its batch.
            batch.append(frame)
            if found is not None:
                self._check(frame, found)
                self.stored += 1
                known = len(batch)
                yield frame, found
            else:
                reading = False
                if self._options.from_detections or (self._store and self._store.end is not None):
                    self._note_cut(frame)
                    return
            if len(batch) == self._options.batch_size:
                yield from self._detect(batch, known)
                batch, known = [], 0
        yield from self._detect(batch, known)

    def _detect(self, batch: list[Frame], known: int) -> Iterator[Pair]:
        """Run the detector on a batch; yield all but the first `known` frames."""
        if known == len(batch):
            return
        if self.file is None:
            self.file = self._writer()
            self._model = self._detector()
        results = self._model(
            [f.index for f in batch], [f.time for f in batch], [f.image for f in batch]
        )
        for frame, found in zip(batch[known:], results[known:], strict=True):
            self.file.write(found)
            self.detected += 1
            yield frame, found

    def _check(self, frame: Frame, found: FrameDetections) -> None:
        if frame.index != found.index or abs(frame.time - found.time) > 1e-3:
            raise ValueError(
                f"{self._options.store}: the stored detections are of another video: frame "
                f"{found.index} at {found.time:.3f} s there, {frame.index} at {frame.time:.3f} s "
                f"in {self._options.input}"
            )

    def _note_cut(self, frame: Frame | None = None) -> None:
        """Say so where the stored detections are cut short."""
        assert self._store is not None
        if self._store.end is None or frame is not None:
            damage = f" ({self._store.damage})" if self._store.damage else ""
            self.problem = f"the stored detections end after {self.stored} frames{damage}"
