"""Frames, and what every source of them says about itself."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np

__all__ = ["Frame", "FrameSource", "Selection", "SourceInfo", "sampled_digest"]

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
