"""Frames, what every source of them says about itself, and those of a video file."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import struct
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

__all__ = [
    "Frame",
    "FrameSource",
    "Selection",
    "SourceInfo",
    "VideoFile",
    "sampled_digest",
]


SAMPLE = 2**14
"""Bytes at the beginning, in the middle and at the end of a file that `sampled_digest` reads."""


def sampled_digest(files: Iterable[str | os.PathLike[str]]) -> str:
    """Return a digest by which a file that took another's name and size is told from it.

    An hour of video is not read for it: three samples of each file count, and its size.
    """
    digest = hashlib.blake2b(digest_size=8)
    for path in files:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(str(size).encode())
            for place in (0, size // 2, max(0, size - SAMPLE)):
                file.seek(place)
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Frame:
    """One picture of a video.

    Attributes:
        index: its number in the video, from 0, whatever was left out before.
        time: its time stamp as the file has it, seconds; later than that of the frame before.
        image: (H, W, 3) uint8 BGR, upright; None where only stored detections are read.
    """

    index: int
    time: float
    image: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class SourceInfo:
    """What a source says about itself before it is read.

    Attributes:
        name: path or name, for messages and files.
        width: pixels, upright.
        height: pixels, upright.
        fps: average number of frames per second.
        expected: frames that will come, as the file announces; None where nobody knows.
        bytes: size of the file or files; 0 for a camera.
        aspect: width of a pixel over its height as it is shown, upright (sample aspect ratio).
        first: time of the first frame, seconds.
        content: digest of samples of the file or files, see `sampled_digest`; "" for a camera.
    """

    name: str
    width: int
    height: int
    fps: float
    expected: int | None
    bytes: int
    aspect: float = 1.0
    first: float = 0.0
    content: str = ""


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which frames of a video are read.

    Attributes:
        stride: every N-th frame.
        start: seconds of the file's own clock; frames before are left out; 0: from the first.
        end: likewise; frames from there on are left out; None: to the end.

    Raises:
        ValueError: for a number that is out of range or not finite, by the name of its option.
    """

    stride: int = 1
    start: float = 0.0
    end: float | None = None

    def __post_init__(self) -> None:
        if self.stride < 1:
            raise ValueError(f"--stride must be at least 1, got {self.stride}")
        for name, value in (("--start", self.start), ("--end", self.end)):
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a number of seconds, 0 or more, got {value}")
        if self.end is not None and self.end <= self.start:
            raise ValueError(f"--end must be after --start, got {self.start} and {self.end}")

    def covers(self, count: int | None, fps: float, begin: float = 0.0) -> int | None:
        """Return how many frames of `count` are selected, at an even frame rate from `begin`."""
        if count is None:
            return None if self.end is None else round((self.end - self.start) * fps / self.stride)
        first = max(0, round((self.start - begin) * fps)) if self.start > 0 else 0
        last = count if self.end is None else min(count, round((self.end - begin) * fps))
        return max(0, -(-(last - first) // self.stride))


class FrameSource(Protocol):
    """A video, a folder or a camera.

    Attributes:
        info: what it says about itself.
        seen: frames that were read so far, selected or not.
        problem: after the iteration: why it ended early, empty where it did not.
        damaged: places that could not be decoded and were passed over.
    """

    info: SourceInfo
    seen: int
    problem: str
    damaged: int

    def __iter__(self) -> Iterator[Frame]:
        """Yield the selected frames, in order."""
        ...


_DEFAULT_FPS = 25.0
_REORDERED = 4  # frames by which stamps out of order fall back; a joint of files falls further


class _Clock:
    """The times of decoded frames: those of the file, where they rise.

    Files joined end to end (``cat a.ts b.ts``) begin again at an earlier time: what follows is
    moved behind the joint and keeps its pace. A stamp that is missing, doubled or a little out of
    order is put behind the one before.

    Args:
        fps: the period before two stamps are known is 1 / `fps`.
        begin: time of the first frame where it has no stamp, seconds.
    """

    def __init__(self, fps: float, begin: float) -> None:
        self.period, self._begin = 1 / fps, begin
        self._offset = 0.0
        self.last: float | None = None

    def time_of(self, picture: VideoFrame) -> float:
        """Return the time of the next frame, seconds."""
        stamp = None
        if picture.pts is not None and picture.time_base is not None:
            stamp = float(picture.pts * Fraction(picture.time_base)) + self._offset
        if self.last is None:
            self.last = self._begin if stamp is None else stamp
            return self.last
        step = self.period if stamp is None else stamp - self.last
        if step > 0:
            self.period = step
            self.last = self.last + step if stamp is None else stamp
        elif step > -_REORDERED * self.period:
            self.last += self.period / 2
        else:
            self._offset += self.period - step
            self.last += self.period
        return self.last


class VideoFile:
    """Reads a video file with FFmpeg (PyAV), sequentially: a file without an index will do.

    Time stamps are the file's, see `_Clock`. A rotation flag is applied; the sample aspect ratio is
    not, but said. What cannot be decoded is passed over and counted; where the file ends before it
    should, `problem` says so after the iteration.

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
            self._lone = len(container.streams) == 1 or bool(stream.duration)
            began = float((stream.start_time or 0) * (stream.time_base or 0))
            length = max(0.0, (self._ends or 0.0) - began)
            announced = self._count or round(length * self._fps) or None
            aspect = float(stream.sample_aspect_ratio or 1)
            first = next(self._decode(container, stream), None)
        if first is None:
            raise ValueError(
                f"--input {path}: 0 frames could be read (it announces {announced or 'none'}"
                f"{'; ' + self.problem if self.problem else ''})"
            )
        height, width = _upright(first).shape[:2]
        self._shape = (height, width)
        self._first = _Clock(self._fps, 0.0).time_of(first)
        if not 0.1 <= aspect <= 10:  # no camera's: damaged
            aspect = 1.0
        self.problem, self.damaged = "", 0
        self.info = SourceInfo(
            name=str(path),
            width=width,
            height=height,
            fps=self._fps,
            expected=selection.covers(announced, self._fps, self._first),
            bytes=path.stat().st_size,
            aspect=1 / aspect if round(first.rotation / 90) % 2 else aspect,
            first=self._first,
            content=sampled_digest([path]),
        )

    def __iter__(self) -> Iterator[Frame]:
        """Yield the selected frames.

        Raises:
            ValueError: if nothing of the file lies in the selected time.
        """
        self.seen, self.problem, self.damaged = 0, "", 0
        selected, stopped = 0, False
        skip, before, key = 0, 0, None
        if self._selection.start > 0:
            skip, before, key = _entry(self._path, self._selection.start)
        clock = _Clock(self._fps, before / self._fps)
        longest = clock.period
        with _open(self._path) as container:
            stream = _video_stream(container, self._path)
            stream.thread_type = "AUTO"
            index = before
            for picture in self._decode(container, stream, skip):
                if key is not None and picture.pts is not None and picture.pts < key:
                    continue  # it needs frames before the key frame, which were left out
                key = None
                time = clock.time_of(picture)
                if self._selection.end is not None and time >= self._selection.end:
                    stopped = True
                    break
                self.seen = index + 1
                longest = max(longest, clock.period)
                index += 1
                if self._selection.start > 0 and time < self._selection.start:
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
        if not stopped:
            self._check_length((clock.last or 0.0) + longest)
        if selected == 0 and not self.problem:
            self._complain_of_selection(self._ends if stopped else clock.last)

    def _complain_of_selection(self, last: float | None) -> None:
        """Say which times the file has, where none of them is selected."""
        chosen = f"--start {self._selection.start}"
        if self._selection.end is not None:
            chosen += f" --end {self._selection.end}"
        count = f"its {self.seen} frames" if self.seen else "its frames"
        until = "" if last is None else f" to {last:.3f} s"
        raise ValueError(
            f"{chosen}: no frame of {self._path} lies there: by the file's own clock {count} go "
            f"from {self._first:.3f} s{until}"
        )

    def _decode(
        self, container: InputContainer, stream: VideoStream, skip: int = 0
    ) -> Iterator[Any]:
        """Yield decoded frames; leave out the first `skip` packets without decoding them."""
        import av

        packets = container.demux(stream)
        passed, before = 0, None
        suspects: list[int] = []
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
                suspects.append(passed)
            if packet.dts is not None:
                if before is not None and packet.dts < before:
                    # Joined files: the counters of a transport stream begin again, too, which the
                    # demuxer takes for lost packets just before.
                    self.damaged -= sum(passed - at <= _REORDERED for at in suspects)
                    suspects.clear()
                before = packet.dts
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
        # An edit list hides frames that are counted, and sound may be longer than the picture:
        # a file is short where both its count and its clock say so.
        if self._count and self._count - self.seen <= 2:
            return
        short = False
        if self._ends is not None:
            tolerated = 2 / self._fps + 0.005 * self._ends + (0.0 if self._lone else 1.0)
            short = self._ends - last > tolerated
        if self._count and (short or self._ends is None):
            self.problem = f"it ends after {self.seen} of {self._count} announced frames"
        elif short:
            self.problem = (
                f"it ends after {self.seen} frames at {last:.2f} s, {self._ends:.2f} s are "
                "announced"
            )


def _open(path: Path) -> InputContainer:
    """Open a file; a ValueError says why it is no video."""
    import av

    try:
        # A colon would make a protocol of a name; a name that is not UTF-8 cannot be handed over.
        name: Any = f"file:{path}"
        if not name.isprintable() or os.fsencode(path) != str(path).encode("utf-8", "replace"):
            name = path.open("rb")
        container: InputContainer = av.open(name, metadata_errors="ignore")
        return container
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


def _video_stream(container: InputContainer, path: Path) -> VideoStream:
    """Return the stream that players show: the default one, never a cover picture."""
    from av.stream import Disposition

    videos = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not videos:
        kinds = ", ".join(sorted({s.type for s in container.streams})) or "nothing"
        cover = ": its picture is a cover" if container.streams.video else ""
        raise ValueError(f"--input {path}: has no video, only {kinds}{cover}")
    default = [s for s in videos if s.disposition & Disposition.default]
    return (default or videos)[0]


def _end_of(stream: VideoStream, container: InputContainer) -> float | None:
    """Return the time at which a video ends by its own account; None where it does not say."""
    start = float((stream.start_time or 0) * (stream.time_base or 0))
    if stream.duration:
        length = float(stream.duration * (stream.time_base or 0))
    elif container.duration:
        start, length = (container.start_time or 0) / 1e6, container.duration / 1e6
    else:
        return None
    # Some writers of Matroska count the length from 0, some from the first frame.
    return min(length, start + length) if "matroska" in container.format.name else start + length


def _upright(picture: VideoFrame) -> np.ndarray:
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
    skip, key, before = 0, None, None
    with _open(path) as container:
        stream = _video_stream(container, path)
        try:
            for ordinal, packet in enumerate(container.demux(stream)):
                if packet.pts is None or not packet.size:
                    continue
                if before is not None and packet.dts is not None and packet.dts < before:
                    return 0, 0, None  # joined files: the clock begins again, see `_Clock`
                before = packet.dts if packet.dts is not None else before
                time = float(packet.pts * Fraction(packet.time_base))
                if packet.is_keyframe and time <= start:
                    skip, key = ordinal, packet.pts
                elif packet.is_keyframe or (packet.dts or 0) * packet.time_base > start:
                    break
                if not packet.is_discard:  # hidden by an edit list
                    shown.append(packet.pts)
        except av.error.FFmpegError:
            pass  # the reading itself will meet it, and say so
    return skip, 0 if key is None else sum(pts < key for pts in shown), key
