"""Where frames come from: what every source says about itself, and which one a name means."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

__all__ = ["STILL_SUFFIXES", "Frame", "FrameSource", "Selection", "SourceInfo", "open_source"]

STILL_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}


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


def open_source(name: str, selection: Selection, fps: float = 25.0) -> FrameSource:
    """Open what a name means: a video file, a folder of pictures, or a camera.

    Args:
        name: path; or the number of a camera, or its device (``/dev/video0``).
        selection: which frames.
        fps: frame rate of a folder, which has none of its own.

    Raises:
        FileNotFoundError: if there is nothing of that name.
        ValueError: if it is something else, or has no picture that can be read.
    """
    from d2kit.engine.video.pictures import Camera, PictureFolder
    from d2kit.engine.video.video_file import VideoFile

    path = Path(name)
    if name.isdigit() or name.startswith("/dev/video"):
        return Camera(name, selection)
    if "://" in name:
        raise ValueError(f"--input {name}: a URL; copy the video to this machine first")
    if path.is_dir():
        return PictureFolder(path, selection, fps)
    if not path.exists():
        raise FileNotFoundError(f"--input {name}: no such file or folder")
    if path.suffix.lower() in STILL_SUFFIXES:
        raise ValueError(
            f"--input {name}: a still picture; tools/predict.py takes pictures, this takes a "
            "video, a folder whose pictures are its frames, or a camera"
        )
    if os.path.getsize(path) == 0:
        raise ValueError(f"--input {name}: the file is empty (0 bytes), expected a video")
    return VideoFile(path, selection)
