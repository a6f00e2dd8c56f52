"""Frames of a video file, whatever state it is in."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from d2kit.video.frames import Frame, Selection, SourceInfo

__all__ = ["VideoFile"]

_DEFAULT_FPS = 25.0


class VideoFile:
    """Reads a video file with FFmpeg (PyAV), sequentially: a file without an index will do.

    Time stamps are the file's. A rotation flag is applied. What cannot be decoded is passed over
    and counted; where the file ends before it should, `problem` says so after the iteration.

    Args:
        path: the file.
        selection: which frames.

    Raises:
        ValueError: if it is no video, or not one frame of it can be decoded.
    """

    def __init__(self, path: Path, selection: Selection) -> None:
        self._path, self._selection = path, selection
        self.seen, self.problem, self.damaged = 0, "", 0
        with _open(path) as container:
            stream = _video_stream(container, path)
            rate = stream.average_rate or stream.guessed_rate
            self._fps = float(rate) if rate else _DEFAULT_FPS
            self._ends = _end_of(stream, container)
            self._count = stream.frames
            self._lone = len(container.streams) == 1
            length = (self._ends or 0.0) - float((stream.start_time or 0) * stream.time_base)
            announced = self._count or round(length * self._fps) or None
            first = next(self._decode(container, stream), None)
        if first is None:
            raise ValueError(
                f"--input {path}: 0 frames could be read (it announces {announced or 'none'}"
                f"{'; ' + self.problem if self.problem else ''})"
            )
        height, width = _upright(first).shape[:2]
        self._shape = (height, width)
        self.problem, self.damaged = "", 0
        self.info = SourceInfo(
            name=str(path),
            width=width,
            height=height,
            fps=self._fps,
            expected=selection.covers(announced, self._fps),
            bytes=path.stat().st_size,
        )

    def __iter__(self) -> Iterator[Frame]:
        """Yield the selected frames.

        Raises:
            ValueError: if nothing of the file lies in the selected time.
        """
        self.seen, self.problem, self.damaged = 0, "", 0
        selected, last, longest = 0, 0.0, 1 / self._fps
        skip, before, key = 0, 0, None
        if self._selection.start > 0:
            skip, before, key = _entry(self._path, self._selection.start)
        with _open(self._path) as container:
            stream = _video_stream(container, self._path)
            stream.thread_type = "AUTO"
            index = before
            for picture in self._decode(container, stream, skip):
                if key is not None and picture.pts is not None and picture.pts < key:
                    continue  # it needs frames before the key frame, which were left out
                time = _time_of(picture, index, self._fps)
                if self._selection.end is not None and time >= self._selection.end:
                    return
                self.seen = index + 1
                longest = max(longest, time - last) if index > before else longest
                last = time
                index += 1
                if time < self._selection.start:
                    continue
                selected += 1
                if (selected - 1) % self._selection.stride:
                    continue
                image = _upright(picture)
                if image.shape[:2] != self._shape:
                    self.problem = (
                        f"frame {index - 1} is {image.shape[1]}x{image.shape[0]} pixels, the ones "
                        f"before {self._shape[1]}x{self._shape[0]}: cut the video there"
                    )
                    return
                yield Frame(index - 1, time, image)
        self._check_length(last + longest)
        if selected == 0 and not self.problem:
            raise ValueError(
                f"--start {self._selection.start}: {self._path} has {self.seen} frames, all "
                "of them before that time"
            )

    def _decode(self, container: Any, stream: Any, skip: int = 0) -> Iterator[Any]:
        """Yield decoded frames; leave out the first `skip` packets without decoding them."""
        import av

        packets = container.demux(stream)
        passed = 0
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except av.error.FFmpegError as error:
                self.problem = f"it cannot be read on: {_reason(error)}"
                return
            passed += 1
            if passed <= skip and packet.size:
                continue
            if packet.is_corrupt:
                self.damaged += 1
            try:
                for frame in packet.decode():
                    self.damaged += frame.is_corrupt
                    yield frame
            except av.error.FFmpegError:
                self.damaged += 1

    def _check_length(self, last: float) -> None:
        """Compare what came, up to the time `last`, with what the file announces."""
        if self.problem:
            return
        if self._count:
            if self._count - self.seen > 2:  # an edit list may hide some
                self.problem = f"it ends after {self.seen} of {self._count} announced frames"
        elif self._ends is not None:
            # A duration without a count may be that of the sound.
            tolerated = 2 / self._fps + 0.005 * self._ends + (0.0 if self._lone else 1.0)
            if self._ends - last > tolerated:
                self.problem = (
                    f"it ends after {self.seen} frames at {last:.2f} s, {self._ends:.2f} s are "
                    "announced"
                )


def _open(path: Path) -> Any:
    """Open a file; a ValueError says why it is no video."""
    import av

    try:
        return av.open(str(path), metadata_errors="ignore")
    except av.error.FFmpegError as error:
        why = _reason(error)
        if isinstance(error, av.error.EOFError):
            why = "it ends before its first frame: 0 frames"
        if _lacks_moov(path):
            why = (
                "the index of an MP4 (its 'moov' box), which is written last, is missing: the "
                "recording was cut off, and nothing of it can be decoded"
            )
        raise ValueError(f"--input {path}: cannot be read as a video: {why}") from error


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def _lacks_moov(path: Path) -> bool:
    """Tell whether a file is an MP4 without the box that describes it."""
    kinds: list[bytes] = []
    with open(path, "rb") as file:
        while len(head := file.read(8)) == 8 and len(kinds) < 1000:
            length, kind = struct.unpack(">I4s", head)
            kinds.append(kind)
            used = 8
            if length == 1 and len(long := file.read(8)) == 8:
                length, used = struct.unpack(">Q", long)[0], 16
            if length < used:
                break
            file.seek(length - used, 1)
    return kinds[:1] == [b"ftyp"] and b"moov" not in kinds


def _video_stream(container: Any, path: Path) -> Any:
    if not container.streams.video:
        kinds = ", ".join(sorted({s.type for s in container.streams})) or "nothing"
        raise ValueError(f"--input {path}: has no video, only {kinds}")
    return container.streams.video[0]


def _end_of(stream: Any, container: Any) -> float | None:
    """Return the time at which a video ends by its own account; None where it does not say."""
    start = float((stream.start_time or 0) * stream.time_base)
    if stream.duration:
        return start + float(stream.duration * stream.time_base)
    if container.duration:
        return (container.start_time or 0) / 1e6 + container.duration / 1e6
    return None


def _time_of(picture: Any, index: int, fps: float) -> float:
    if picture.pts is None or picture.time_base is None:
        return index / fps
    return float(picture.pts * Fraction(picture.time_base))


def _upright(picture: Any) -> np.ndarray:
    """Return a decoded frame as (H, W, 3) uint8 BGR, turned by its rotation flag."""
    image = picture.to_ndarray(format="bgr24")
    turns = round(picture.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(image, turns)) if turns else image


def _entry(path: Path, start: float) -> tuple[int, int, int | None]:
    """Find where decoding must begin for the frames from `start` on, reading packets only.

    Returns:
        The number of packets to leave out, up to the last key frame at or before `start`; the
        number of frames shown before that key frame; its time stamp in the stream's unit.
    """
    import av

    shown: list[int] = []
    skip, key = 0, None
    with _open(path) as container:
        stream = _video_stream(container, path)
        try:
            for ordinal, packet in enumerate(container.demux(stream)):
                if packet.pts is None or not packet.size:
                    continue
                time = float(packet.pts * Fraction(packet.time_base))
                if packet.is_keyframe and time <= start:
                    skip, key = ordinal, packet.pts
                elif packet.is_keyframe or (packet.dts or 0) * packet.time_base > start:
                    break
                shown.append(packet.pts)
        except av.error.FFmpegError:
            pass  # the reading itself will meet it, and say so
    return skip, 0 if key is None else sum(pts < key for pts in shown), key
