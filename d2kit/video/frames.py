"""Frames, and what every source of them says about itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Protocol

import numpy as np

__all__ = ["Frame", "FrameSource", "Selection", "SourceInfo"]


@dataclasses.dataclass(frozen=True)
class Frame:
    """One picture of a video.

    Attributes:
        index: its number in the video, from 0, whatever was left out before.
        time: its time stamp as the file has it, seconds.
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
    """

    name: str
    width: int
    height: int
    fps: float
    expected: int | None
    bytes: int


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which frames of a video are read.

    Attributes:
        stride: every how manieth frame.
        start: seconds; frames before are left out.
        end: seconds; frames from there on are left out; None: to the end.
    """

    stride: int = 1
    start: float = 0.0
    end: float | None = None

    def __post_init__(self) -> None:
        if self.stride < 1:
            raise ValueError(f"--stride must be at least 1, got {self.stride}")
        if self.end is not None and self.end <= self.start:
            raise ValueError(f"--end must be after --start, got {self.start} and {self.end}")

    def covers(self, count: int | None, fps: float) -> int | None:
        """Return how many frames of `count` are selected, at an even frame rate."""
        if count is None:
            return None if self.end is None else round((self.end - self.start) * fps / self.stride)
        first = max(0, round(self.start * fps)) if self.start > 0 else 0
        last = count if self.end is None else min(count, round(self.end * fps))
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
