"""People made unrecognisable: their pixels are replaced, not smoothed."""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Generic, TypeVar

import numpy as np

from d2kit.tracking import Sighting
from d2kit.video.association import MaskPatch, TrackedFrame, patch_of
from d2kit.video.overlay import track_color

Item = TypeVar("Item")
_WAIT = 0.1  # seconds after which a stage that waits looks whether it was told to stop


class Background(Generic[Item]):
    """Runs an iterable in a thread and hands its items on, at most `depth` ahead.

    An exception of the iterable is raised where its items are consumed. `close` ends the thread.

    Args:
        items: what to run; only the thread touches it.
        depth: items that may wait, >= 1: what bounds the memory.
        name: of the thread, for debuggers.
    """

    def __init__(self, items: Iterable[Item], depth: int, name: str) -> None:
        self._queue: queue.Queue[Item] = queue.Queue(depth)
        self._items = items
        self._stop = threading.Event()
        self._done = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for item in self._items:
                while not self._stop.is_set():
                    try:
                        self._queue.put(item, timeout=_WAIT)
                        break
                    except queue.Full:
                        continue
                if self._stop.is_set():
                    break
        except BaseException as error:  # it belongs to whoever consumes the items
            self._error = error
        finally:
            close = getattr(self._items, "close", None)  # a generator's clean-up, in its thread
            if close is not None:
                close()
            self._done.set()

    def __iter__(self) -> Iterator[Item]:
        while True:
            try:
                yield self._queue.get(timeout=_WAIT)
                continue
            except queue.Empty:
                if not self._done.is_set():
                    continue
            if not self._queue.empty():  # put between the two looks
                continue
            if self._error is not None:
                raise self._error
            return

    def stop(self) -> None:
        """Tell the thread to end after the item at hand."""
        self._stop.set()

    def close(self) -> None:
        """End the thread and wait for it; what it reads from should have been stopped before."""
        self._stop.set()
        self._thread.join()


BLUR_MODES = ("people", "bystanders", "faces")

LEAST_DIFFERENCE = 40.0
"""Mean absolute difference to the original, in grey levels of 255, inside every region."""

_MARGIN = 0.06  # of the region's height, added all around: masks end within the outline
_HEAD = 0.3  # share of a body's length that counts as its head end
_LYING = 0.5  # sine of the axis below which either end may be the head
_COMPACT = 1.3  # ratio of the axes below which a body has no clear direction
_SAME = 0.7  # overlap from which a detection without identity is the subject a second time


@dataclasses.dataclass(frozen=True)
class _Person:
    """Somebody to hide: identity (0: none), what is seen of them, and whether it is a box."""

    identity: int
    patch: MaskPatch
    is_box: bool


class Anonymizer:
    """Fills the regions of people with one colour each, the colour of their identity.

    Nothing of a region is left: no blur that could be undone, no mosaic that could be averaged
    over frames. Where the colour is too close to the original its complement is taken, so that
    the mean absolute difference is at least `LEAST_DIFFERENCE` in every frame. Hidden is everybody
    that was detected, tracked or not, and whom a filled gap supposes.

    Args:
        mode: "people": everybody; "bystanders": everybody but the subject; "faces": the head end
            of everybody.
        subject: identity of the subject, for "bystanders".
        classes: contiguous classes that are people.
        least_score: detections below are not taken for people.

    Raises:
        ValueError: if mode and subject do not fit.
    """

    def __init__(
        self,
        mode: str,
        *,
        subject: int | None = None,
        classes: Sequence[int],
        least_score: float = 0.2,
    ) -> None:
        if mode not in BLUR_MODES:
            raise ValueError(f"--blur: expected one of {', '.join(BLUR_MODES)}, got {mode!r}")
        if (mode == "bystanders") != (subject is not None):
            raise ValueError(
                "--blur bystanders needs --subject ID, the identity that stays visible"
                if subject is None
                else f"--subject {subject} goes with --blur bystanders, got --blur {mode}"
            )
        self._mode, self._subject = mode, subject
        self._classes, self._least = set(classes), least_score

    def __call__(self, tracked: TrackedFrame, size: tuple[int, int]) -> np.ndarray:
        """Return a copy of the frame with the regions filled.

        Args:
            tracked: the frame; its image is not changed.
            size: (height, width).
        """
        original = tracked.frame.image
        assert original is not None, "frames without a picture are not drawn"
        image: np.ndarray = original.copy()
        regions = self.regions(tracked, size)
        for identity, region in regions:
            fill = np.array(track_color(identity))
            if _difference(original, region, fill) < LEAST_DIFFERENCE:
                fill = 255 - fill
            _fill(image, region, fill)
        for _, region in regions:  # a neighbour's colour may have covered this one's
            if _difference(original, region, _part(image, region)) < LEAST_DIFFERENCE:
                dark = _difference(original, region, np.zeros(3)) >= 127.5
                _fill(image, region, np.full(3, 0 if dark else 255))
        return image

    def hidden(self, sightings: Sequence[Sighting]) -> set[int]:
        """Return the identities whose whole body is filled."""
        if self._mode == "faces":
            return set()
        kept = {self._subject}
        return {s.track_id for s in sightings if s.class_id in self._classes} - kept  # type: ignore[operator]

    def regions(self, tracked: TrackedFrame, size: tuple[int, int]) -> list[tuple[int, MaskPatch]]:
        """Return what is hidden in a frame: identity (0: none) and the pixels."""
        found = []
        visible = self._visible(tracked.sightings)
        for person in self._people(tracked, size):
            patch = person.patch
            if self._mode == "faces":
                patch = _head_of_box(patch) if person.is_box else head_of(patch)
            grown = _grown(patch, size)
            if visible is not None:
                grown = _without(grown, visible, keep=patch)
            if grown.bits.any():
                found.append((person.identity, grown))
        return found

    def _visible(self, sightings: Sequence[Sighting]) -> MaskPatch | None:
        if self._subject is None:
            return None
        masks = [s.mask for s in sightings if s.track_id == self._subject and s.mask is not None]
        return masks[0] if masks else None

    def _people(self, tracked: TrackedFrame, size: tuple[int, int]) -> list[_Person]:
        """List everybody to hide: the tracks, then the detections that are in no track."""
        people = []
        shown = [s for s in tracked.sightings if s.track_id == self._subject]
        taken = set()
        for sighting in tracked.sightings:
            taken.add(sighting.box)
            if sighting.class_id in self._classes and sighting.track_id != self._subject:
                patch = sighting.mask or _box_patch(sighting.box, size)
                people.append(_Person(sighting.track_id, patch, sighting.mask is None))
        found = tracked.found.chosen(self._least)
        for row in range(len(found)):
            box = tuple(round(v, 2) for v in found.boxes[row].tolist())
            if box in taken or int(found.classes[row]) not in self._classes:
                continue
            patch = (
                _box_patch(box, size) if found.masks is None else patch_of(found.masks[row], size)
            )
            if any(_iou(patch, s.mask or _box_patch(s.box, size)) > _SAME for s in shown):
                continue
            people.append(_Person(0, patch, found.masks is None))
        return people


def head_of(patch: MaskPatch) -> MaskPatch:
    """Return the head end of a body's mask.

    That is the upper end of its principal axis, both ends where the axis lies, and the top of the
    mask in any case; all of it where it has no clear direction.
    """
    ys, xs = np.nonzero(patch.bits)
    if len(xs) < 3:
        return patch
    points = np.stack([xs, ys], 1).astype(np.float64)
    points -= points.mean(0)
    spread, axes = np.linalg.eigh(points.T @ points / len(points))
    if spread[1] < _COMPACT**2 * max(spread[0], 1e-9):
        return patch
    axis = axes[:, 1] if axes[1, 1] < 0 else -axes[:, 1]  # y grows downwards: the axis points up
    along = points @ axis
    length = along.max() - along.min()
    head = along >= along.max() - _HEAD * length
    if abs(axis[1]) < _LYING:
        head |= along <= along.min() + _HEAD * length
    head |= ys <= _HEAD * patch.bits.shape[0] * 0.8
    bits = np.zeros_like(patch.bits)
    bits[ys[head], xs[head]] = 1
    return MaskPatch(patch.x, patch.y, bits)


def _head_of_box(patch: MaskPatch) -> MaskPatch:
    """Return the upper part of a box, all of it where it is wider than high."""
    height, width = patch.bits.shape
    if width > height:
        return patch
    return MaskPatch(patch.x, patch.y, patch.bits[: max(1, round(_HEAD * height))])


def _box_patch(box: Sequence[float], size: tuple[int, int]) -> MaskPatch:
    x0, y0 = max(0, int(box[0])), max(0, int(box[1]))
    x1, y1 = min(size[1], int(np.ceil(box[2]))), min(size[0], int(np.ceil(box[3])))
    return MaskPatch(x0, y0, np.ones((max(0, y1 - y0), max(0, x1 - x0)), np.uint8))


def _grown(patch: MaskPatch, size: tuple[int, int]) -> MaskPatch:
    """Return the region with a margin around it, within the frame."""
    import cv2

    height, width = patch.bits.shape
    if not patch.bits.any():
        return patch
    margin = max(2, round(_MARGIN * max(height, width)))
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * margin + 1, 2 * margin + 1))
    grown = cv2.dilate(np.pad(patch.bits, margin), kernel)
    left, top = max(0, margin - patch.x), max(0, margin - patch.y)
    right = min(width + 2 * margin, size[1] - patch.x + margin)
    bottom = min(height + 2 * margin, size[0] - patch.y + margin)
    return MaskPatch(
        patch.x - margin + left,
        patch.y - margin + top,
        np.ascontiguousarray(grown[top:bottom, left:right]),
    )


def _without(region: MaskPatch, visible: MaskPatch, keep: MaskPatch) -> MaskPatch:
    """Take the pixels of `visible` out of a region, but none that are `keep`."""
    bits = region.bits.copy()
    shown = np.zeros_like(bits)
    _paste(shown, region, visible)
    kept = np.zeros_like(bits)
    _paste(kept, region, keep)
    bits[(shown > 0) & (kept == 0)] = 0
    return MaskPatch(region.x, region.y, bits)


def _paste(canvas: np.ndarray, frame: MaskPatch, patch: MaskPatch) -> None:
    """Write the bits of `patch` on a canvas that has the place of `frame`."""
    x0, y0 = max(frame.x, patch.x), max(frame.y, patch.y)
    x1 = min(frame.x + canvas.shape[1], patch.x + patch.bits.shape[1])
    y1 = min(frame.y + canvas.shape[0], patch.y + patch.bits.shape[0])
    if x1 > x0 and y1 > y0:
        canvas[y0 - frame.y : y1 - frame.y, x0 - frame.x : x1 - frame.x] = patch.bits[
            y0 - patch.y : y1 - patch.y, x0 - patch.x : x1 - patch.x
        ]


def _part(image: np.ndarray, patch: MaskPatch) -> np.ndarray:
    """Return the (P, 3) pixels of an image in a region."""
    height, width = patch.bits.shape
    return image[patch.y : patch.y + height, patch.x : patch.x + width][patch.bits > 0]


def _difference(original: np.ndarray, patch: MaskPatch, other: np.ndarray) -> float:
    """Return the mean absolute difference of the original's region to (P, 3) or (3,) pixels."""
    return float(np.abs(_part(original, patch).astype(np.int16) - other).mean())


def _fill(image: np.ndarray, patch: MaskPatch, color: np.ndarray) -> None:
    height, width = patch.bits.shape
    image[patch.y : patch.y + height, patch.x : patch.x + width][patch.bits > 0] = color


def _iou(first: MaskPatch, second: MaskPatch) -> float:
    other = np.zeros_like(first.bits)
    _paste(other, first, second)
    common = np.count_nonzero(first.bits & other)
    union = np.count_nonzero(first.bits) + np.count_nonzero(second.bits) - common
    return common / union if union else 0.0
