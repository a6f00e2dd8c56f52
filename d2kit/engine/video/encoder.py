"""Writes a video that every browser plays."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["VideoEncoder"]

_CLOCK = 90_000  # ticks per second: exact for 24, 25, 30 and, to 11 microseconds, any other rate


class VideoEncoder:
    """H.264 in MP4 (yuv420p, index first), with the time stamps of the source.

    It is written to a hidden name beside the target, which it takes when it is complete.

    Args:
        path: the target, ``.mp4``.
        width: pixels; odd ones are made even by repeating the last column.
        height: pixels; likewise.
        fps: average frame rate.
        preset: of x264: how long it searches; ultrafast ... veryslow.
        crf: constant rate factor of x264: 18 looks lossless, 28 is small.
    """

    def __init__(
        self,
        path: Path,
        *,
        width: int,
        height: int,
        fps: float,
        preset: str = "veryfast",
        crf: int = 23,
    ) -> None:
        import av

        self._path = path
        self._partial = partial_name(path)
        self._pad = (height % 2, width % 2)
        self._container: Any = av.open(
            str(self._partial), "w", format="mp4", options={"movflags": "+faststart"}
        )
        rate = Fraction(fps).limit_denominator(1001)
        self._stream: Any = self._container.add_stream("libx264", rate=rate)
        self._stream.width, self._stream.height = width + width % 2, height + height % 2
        self._stream.pix_fmt = "yuv420p"
        self._stream.options = {"crf": str(crf), "preset": preset}
        self._stream.codec_context.time_base = Fraction(1, _CLOCK)
        self._first: float | None = None
        self._last = -1
        self.frames = 0

    def write(self, image: np.ndarray, time: float) -> None:
        """Append a frame.

        Args:
            image: (H, W, 3) uint8 BGR.
            time: its time stamp, seconds; the first one becomes 0.
        """
        import av

        if any(self._pad):
            image = np.pad(image, ((0, self._pad[0]), (0, self._pad[1]), (0, 0)), mode="edge")
        picture = av.VideoFrame.from_ndarray(image, format="bgr24")
        if self._first is None:
            self._first = time
        self._last = max(self._last + 1, round((time - self._first) * _CLOCK))
        picture.pts, picture.time_base = self._last, Fraction(1, _CLOCK)
        for packet in self._stream.encode(picture):
            self._container.mux(packet)
        self.frames += 1

    def close(self) -> None:
        """Finish the file and give it its name."""
        for packet in self._stream.encode():
            self._container.mux(packet)
        self._container.close()
        os.replace(self._partial, self._path)

    def discard(self) -> None:
        """Remove what was written."""
        self._container.close()
        self._partial.unlink(missing_ok=True)


def partial_name(path: Path) -> Path:
    """Return the name that a file has while it is written."""
    return path.with_name(f".{path.name}.partial")
