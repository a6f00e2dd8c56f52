r"""Detections on disk: append-only, compact, readable while they grow, sound after a crash.

The file is ``gzip`` of JSON lines, written as one gzip member after another: a member holds some
frames and ends with a checksum. What was being written when the process died is the last member;
it is cut off. ``zcat`` shows the file. The first line describes the run, the last one says how it
ended: a file without it was cut short and can be continued.
"""

from __future__ import annotations

import gzip
import json
import os
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from d2kit.data.datasets._rle import rle_problem
from d2kit.engine.video.detections import FrameDetections

__all__ = ["DetectionStore", "DetectionWriter"]

FORMAT = "d2kit detections 1"
_BLOCK = 2**16
_MEMBER_LIMIT = 2**28  # bytes of text of one member: no file of ours comes near
_FRAMES, _SECONDS = 64, 5.0  # a member is closed after so many frames or so long


class DetectionWriter:
    """Appends frames to a store.

    Args:
        path: the file; must not exist, unless `append`.
        header: describes the run; JSON. Ignored where the file is continued.
        append: continue the file, from the end of its last sound member.
        frames: number of frames after which they are written and synced to the disk.
        seconds: time after which they are, should there be fewer.
    """

    def __init__(
        self,
        path: Path,
        header: dict[str, Any],
        *,
        append: DetectionStore | None = None,
        frames: int = _FRAMES,
        seconds: float = _SECONDS,
    ) -> None:
        self._limits = (frames, seconds)
        self._lines: list[str] = []
        self._since = time.monotonic()
        self._file: IO[bytes]
        if append is None:
            self._file = path.open("xb")
            self._lines.append(json.dumps({"format": FORMAT, **header}))
            self._write()
        else:
            self._file = path.open("r+b")
            self._file.truncate(append.sound_bytes)
            self._file.seek(append.sound_bytes)

    def write(self, found: FrameDetections) -> None:
        """Append one frame."""
        record: dict[str, Any] = {
            "frame": found.index,
            "time": found.time,
            "boxes": [[round(v, 2) for v in box] for box in found.boxes.tolist()],
            "scores": [round(v, 4) for v in found.scores.tolist()],
            "classes": found.classes.tolist(),
        }
        if found.masks is not None:
            record["masks"] = found.masks
        self._lines.append(json.dumps(record, separators=(",", ":")))
        frames, seconds = self._limits
        if len(self._lines) >= frames or time.monotonic() - self._since > seconds:
            self._write()

    def close(self, end: dict[str, Any] | None = None) -> None:
        """Write what is left and close the file.

        Args:
            end: how the run ended, where it did; None leaves the file open to be continued.
        """
        if self._file.closed:
            return
        if end is not None:
            self._lines.append(json.dumps({"end": end}))
        self._write()
        self._file.close()

    def _write(self) -> None:
        if self._lines:
            text = "\n".join(self._lines) + "\n"
            self._file.write(gzip.compress(text.encode(), compresslevel=6, mtime=0))
            self._file.flush()
            os.fsync(self._file.fileno())
        self._lines = []
        self._since = time.monotonic()


class DetectionStore:
    """Reads a store, one member at a time.

    Args:
        path: the file.

    Attributes:
        header: what describes the run.
        end: how it ended; None until it was read to the end, and where it was cut short.
        sound_bytes: length of the sound members read so far.
        damage: what is wrong after them, empty where nothing is.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is no such file.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(
                f"{self.path}: no stored detections there; run once without --from-detections"
            )
        self.sound_bytes, self.damage = 0, ""
        self.end: dict[str, Any] | None = None
        first = next(self._lines(), None)
        if first is None or first.get("format") != FORMAT:
            raise ValueError(
                f"{self.path}: not a file of detections ('{FORMAT}'), or cut off in its first "
                f"lines{': ' + self.damage if self.damage else ''}"
            )
        self.header = first
        self.size = self._size()

    def _size(self) -> tuple[int, int]:
        height, width = self.header.get("height"), self.header.get("width")
        if not (isinstance(height, int) and isinstance(width, int) and min(height, width) > 0):
            raise ValueError(
                f"{self.path}: header: height and width must be positive integers, got {height!r} "
                f"and {width!r}"
            )
        return height, width

    def __iter__(self) -> Iterator[FrameDetections]:
        """Yield the frames, from the first.

        Raises:
            ValueError: for a record that is damaged although its checksum is right.
        """
        self.sound_bytes, self.damage, self.end = 0, "", None
        lines = self._lines()
        next(lines)
        for line in lines:
            if "end" in line:
                self.end = line["end"]
                return
            yield self._record(line)

    def _record(self, line: dict[str, Any]) -> FrameDetections:
        try:
            found = FrameDetections(
                int(line["frame"]),
                float(line["time"]),
                np.array(line["boxes"], np.float64),
                np.array(line["scores"], np.float64),
                np.array(line["classes"], np.int64),
                line.get("masks"),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path}: frame {line.get('frame')!r}: {error}") from error
        for counts in found.masks or ():
            rle = {"size": list(self.size), "counts": counts}
            problem = rle_problem(rle, *self.size)
            if problem:
                raise ValueError(f"{self.path}: frame {found.index}: {problem}")
        return found

    def _lines(self) -> Iterator[dict[str, Any]]:
        """Yield the lines of one sound member after another."""
        rest = b""
        with open(self.path, "rb") as file:
            while True:
                rest = rest or file.read(_BLOCK)
                if not rest:
                    return
                member, text = zlib.decompressobj(wbits=31), b""
                try:
                    used = 0
                    while not member.eof:
                        text += member.decompress(rest)
                        used += len(rest) - len(member.unused_data)
                        if len(text) > _MEMBER_LIMIT:
                            raise zlib.error(f"a member of more than {_MEMBER_LIMIT} bytes")
                        if member.eof:
                            break
                        rest = file.read(_BLOCK)
                        if not rest:
                            raise zlib.error("the last frames are incomplete")
                    lines = [json.loads(line) for line in text.splitlines()]
                except (zlib.error, ValueError) as error:
                    self.damage = f"after {self.sound_bytes} bytes: {error}"
                    return
                rest = member.unused_data
                self.sound_bytes += used
                yield from lines
