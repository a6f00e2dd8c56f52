"""The files of a tracked video, written line by line: all of one run, or none of them."""

from __future__ import annotations

import csv
import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import numpy as np

from d2kit.tracking import Sighting
from d2kit.utils.text import csv_cell
from d2kit.video.association import TrackedFrame

FRAMES = "frames"
"""Folder of the kept frames."""

SUMMARY = "summary.json"
_FILES = ("annotated.mp4", "tracks.csv", "tracks.json", "mot.txt", SUMMARY)
_FRAME = re.compile(r"\d{6,}\.jpg")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def partial_name(path: Path) -> Path:
    """Return the name that a file has while it is written."""
    return path.with_name(f".{path.name}.partial")


def _listed(path: Path) -> set[str] | None:
    """Return the names that a summary vouches for; None where it is none of ours."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or "frames_from_store" not in found:
        return None
    files = found.get("files", dict.fromkeys(_FILES))  # before there was a list
    return {SUMMARY, *files} if isinstance(files, dict) else {SUMMARY}


def clear_results(folder: Path, source: str, *, frames: bool) -> None:
    """Remove what earlier runs left under the names of results, killed ones included.

    Stored detections stay: they hold no picture.

    Args:
        folder: of the results; nobody else may write to it.
        source: the input of the next run.
        frames: whether pictures under ``frames/`` matter to it: it writes some, or hides people.

    Raises:
        ValueError: if a file has the name of a result and no summary lists it, or if the input is
            one of the results; nothing is removed.
    """
    summaries = [folder / SUMMARY, partial_name(folder / SUMMARY)]
    ours = set().union(*(_listed(path) or () for path in summaries))
    there = [folder / name for name in _FILES]
    kept = folder / FRAMES
    if kept.is_dir():
        there += sorted(p for p in kept.iterdir() if _FRAME.fullmatch(p.name))
    there = [path for path in there if os.path.lexists(path)]
    old = [path for path in there if path.relative_to(folder).as_posix() in ours]
    strange = [p for p in there if p not in old and (frames or p.parent == folder)]
    if strange:
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        raise ValueError(
            f"--output {folder}: {strange[0].relative_to(folder)}{more} would be overwritten, and "
            "no summary.json there lists it as the result of a tracking; move it away, or choose "
            "another --output"
        )
    _keep_input(folder, source, old)
    for path in old:
        path.unlink()
    for name in (*_FILES, FRAMES):
        hidden = partial_name(folder / name)
        if hidden.is_dir():
            shutil.rmtree(hidden)
        else:
            hidden.unlink(missing_ok=True)
    with suppress(OSError):  # it holds other files
        kept.rmdir()


def _keep_input(folder: Path, source: str, old: list[Path]) -> None:
    """Refuse to remove what is to be read."""
    if not source or not old:
        return
    wanted = Path(source).resolve()
    if any(wanted in (path.resolve(), path.parent.resolve()) for path in old if path.exists()) and (
        wanted != folder.resolve()
    ):
        raise ValueError(
            f"--input {source} is a result of an earlier tracking in --output {folder}, which "
            "this one replaces; choose another --output"
        )


def publish(folder: Path, names: list[str], summary: dict[str, Any]) -> None:
    """Give all results their names, the summary last; or remove them all.

    Args:
        folder: where they wait under hidden names.
        names: of the files, and `FRAMES`.
        summary: is written, with ``files``: bytes and SHA-256 of each, added to it. Stored
            detections in the folder are listed too.

    Raises:
        OSError: with path, and sizes where the disk is full.
    """
    waiting: dict[str, Path] = {}
    for name in names:
        hidden = partial_name(folder / name)
        inside = sorted(hidden.iterdir()) if hidden.is_dir() else []
        waiting |= {f"{name}/{p.name}": p for p in inside} if hidden.is_dir() else {name: hidden}
    store = folder / "detections.jsonl.gz"
    listed = waiting | ({store.name: store} if store.is_file() else {})
    summary["files"] = {name: _digest(path) for name, path in listed.items()}
    placed: list[Path] = []
    hidden = partial_name(folder / SUMMARY)
    try:
        with disk_errors(folder / SUMMARY), hidden.open("w", encoding="utf-8") as file:
            json.dump(summary, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        if FRAMES in names:
            (folder / FRAMES).mkdir(exist_ok=True)
        for name, path in (*waiting.items(), (SUMMARY, hidden)):
            with disk_errors(folder / name):
                os.replace(path, folder / name)
            placed.append(folder / name)
    except BaseException:
        for path in (*placed, hidden):
            path.unlink(missing_ok=True)
        with suppress(OSError):
            (folder / FRAMES).rmdir()
        raise
    with suppress(OSError):
        partial_name(folder / FRAMES).rmdir()


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else None
        if digest is None:  # Python 3.10
            digest = hashlib.sha256()
            while block := file.read(2**20):
                digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Let a refusal of the disk name the file, and on a full disk the sizes.

    Args:
        path: the file by its final name; it may still have its hidden one.

    Raises:
        OSError: in place of any error of the block that has a number of the system.
    """
    try:
        yield
    except Exception as error:
        number = getattr(error, "errno", None)
        # FFmpeg's own numbers are negative or far above those of the system
        if not isinstance(number, int) or number not in errno.errorcode:
            raise
        reason = os.strerror(number)
        if number in _FULL:
            hidden = partial_name(path)
            size = max((p.stat().st_size for p in (hidden, path) if p.is_file()), default=0)
            free = shutil.disk_usage(path.parent if path.parent.is_dir() else path.parents[1]).free
            reason += (
                f": wrote {size:,} bytes, {free:,} bytes are free in the folder; free some space, "
                "or choose another --output. The stored detections stay: the same command goes on "
                "from them"
            )
        raise OSError(number, reason, str(path)) from error


PRESETS: tuple[str, ...] = (
    "ultrafast",
    "superfast",
    "veryfast",
    "faster",
    "fast",
    "medium",
    "slow",
    "slower",
)
PRESETS += ("veryslow", "placebo")
"""Of x264: how long it searches."""

_CLOCK = 90_000  # ticks per second: exact for 24, 25, 30 and, to 11 microseconds, any other rate
_SLOW_CLOCK = 1000  # for less than a frame a second: MP4 holds 31 bits of ticks between two frames
_MOST_TICKS = 2**31 - 1


class VideoEncoder:
    """H.264 in MP4 (yuv420p, index first), with the time stamps of the source.

    It is written to a hidden name beside the target, which it takes in `close`.

    Args:
        path: the target, ``.mp4``.
        width: pixels; odd ones are made even by repeating the last column.
        height: pixels; likewise.
        fps: average frame rate.
        aspect: width of a pixel over its height, as the source is shown.
        preset: of x264, see `PRESETS`.
        crf: constant rate factor of x264: 18 looks lossless, 28 is small.

    Attributes:
        partial: the hidden name.
        frames: number of frames written.
    """

    def __init__(
        self,
        path: Path,
        *,
        width: int,
        height: int,
        fps: float,
        aspect: float = 1.0,
        preset: str = "veryfast",
        crf: int = 23,
    ) -> None:
        import av

        self._path, self.partial = path, partial_name(path)
        self._pad = (height % 2, width % 2)
        self._container: Any = av.open(
            f"file:{self.partial}", "w", format="mp4", options={"movflags": "+faststart"}
        )
        slow = fps < 1
        self._clock = _SLOW_CLOCK if slow else _CLOCK
        rate = Fraction(fps).limit_denominator(1001 if not slow else 10**7)
        self._stream: Any = self._container.add_stream("libx264", rate=rate)
        self._stream.width, self._stream.height = width + width % 2, height + height % 2
        self._stream.pix_fmt = "yuv420p"
        self._stream.options = {"crf": str(crf), "preset": preset}
        if slow:  # a reordered frame's offset has 31 bits, too
            self._stream.options |= {"bf": "0"}
        if aspect != 1:
            pixel = Fraction(aspect).limit_denominator(255)
            self._stream.codec_context.sample_aspect_ratio = pixel
            self._stream.sample_aspect_ratio = pixel
        self._stream.codec_context.time_base = Fraction(1, self._clock)
        self._first: float | None = None
        self._last, self._period = -1, max(1, round(self._clock / fps))
        self._durations: dict[int, int] = {}
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
        ticks = round((time - self._first) * self._clock)
        before = self._last
        self._last = min(max(before + 1, ticks), before + _MOST_TICKS)
        if self.frames:
            self._period = self._last - before
            self._durations[before] = self._period
        picture.pts, picture.time_base = self._last, Fraction(1, self._clock)
        self._mux(self._stream.encode(picture))
        self.frames += 1

    def close(self) -> None:
        """Complete the file and give it its name."""
        self.complete()
        os.replace(self.partial, self._path)

    def complete(self) -> None:
        """Complete the file under its hidden name, on the disk, for a name given later."""
        self._durations[self._last] = self._period  # the last one is as long as the one before
        self._mux(self._stream.encode())
        self._container.close()
        with self.partial.open("rb") as file:
            os.fsync(file.fileno())

    def _mux(self, packets: list[Any]) -> None:
        """Write packets with the time for which their frames are shown."""
        for packet in packets:
            # x264 gives a packet out before the next frame is known: then the period is a guess,
            # which MP4 replaces by the next stamp.
            packet.duration = self._durations.pop(packet.pts, self._period)
            self._container.mux(packet)

    def discard(self) -> None:
        """Remove what was written."""
        with suppress(OSError):  # the disk is full: why it is discarded
            self._container.close()
        self.partial.unlink(missing_ok=True)


CSV_COLUMNS = (
    *("frame", "time_s", "track_id", "class_id", "class_name", "score", "x0", "y0", "x1", "y1"),
    *("mask_area_px", "centroid_x", "centroid_y", "speed_px_s", "interpolated"),
)


@dataclasses.dataclass
class TrackSummary:
    """What is known of one identity at the end.

    Attributes:
        id: the identity, from 1.
        first_frame: number of the first frame with it.
        last_frame: number of the last frame with it.
        first_time_s: time stamp of the first, seconds.
        last_time_s: time stamp of the last, seconds.
        frames: number of frames in which it was detected.
        interpolated: number of frames in which it was supposed.
        score_sum: of the detections, by class.
    """

    id: int
    first_frame: int
    first_time_s: float
    last_frame: int = 0
    last_time_s: float = 0.0
    frames: int = 0
    interpolated: int = 0
    score_sum: dict[int, float] = dataclasses.field(default_factory=dict)

    def add(self, index: int, time: float, sighting: Sighting) -> None:
        """Count a sighting."""
        self.last_frame, self.last_time_s = index, time
        if sighting.interpolated:
            self.interpolated += 1
            return
        self.frames += 1
        before = self.score_sum.get(sighting.class_id, 0.0)
        self.score_sum[sighting.class_id] = before + sighting.score

    def as_dict(self, names: Sequence[str]) -> dict[str, Any]:
        """Return it for JSON; the class is the one with the largest sum of scores."""
        best = max(self.score_sum, key=lambda c: (self.score_sum[c], -c))
        return {
            "id": self.id,
            "category_id": best + 1,
            "class_name": _name(names, best),
            "first_frame": self.first_frame,
            "last_frame": self.last_frame,
            "first_time_s": round(self.first_time_s, 6),
            "last_time_s": round(self.last_time_s, 6),
            "frames": self.frames,
            "interpolated": self.interpolated,
            "mean_score": round(sum(self.score_sum.values()) / self.frames, 4),
        }


class TrackWriter:
    """Writes ``tracks.csv``, ``tracks.json`` and ``mot.txt`` as the frames come.

    `close` completes them under their hidden names; only one line per identity is kept in memory.

    Args:
        folder: where to.
        size: (height, width) of the frames.
        names: of the classes.
    """

    def __init__(self, folder: Path, *, size: tuple[int, int], names: Sequence[str]) -> None:
        self._size, self._names = size, names
        self._paths = [folder / name for name in ("tracks.csv", "tracks.json", "mot.txt")]
        self._files: list[IO[str]] = [
            partial_name(path).open("w", encoding="utf-8", newline="") for path in self._paths
        ]
        self._csv = csv.writer(self._files[0], lineterminator="\n")
        self._csv.writerow(CSV_COLUMNS)
        categories = [{"id": i + 1, "name": name} for i, name in enumerate(names)]
        head = {"info": {"description": "d2kit tracks", "version": "1"}, "categories": categories}
        self._files[1].write(json.dumps(head)[:-1] + ', "annotations": [')
        self._count = 0
        self.tracks: dict[int, TrackSummary] = {}

    def write(self, tracked: TrackedFrame) -> None:
        """Append the tracks of a frame."""
        index, time = tracked.frame.index, tracked.frame.time
        for sighting, speed in zip(tracked.sightings, tracked.speeds, strict=True):
            track = self.tracks.setdefault(
                sighting.track_id, TrackSummary(sighting.track_id, index, time)
            )
            track.add(index, time, sighting)
            self._count += 1
            with disk_errors(self._paths[0]):
                self._write_csv(index, time, sighting, speed)
            with disk_errors(self._paths[1]):
                self._write_json(index, time, sighting)
            with disk_errors(self._paths[2]):
                self._write_mot(index, sighting)

    def _write_csv(self, index: int, time: float, s: Sighting, speed: float | None) -> None:
        self._csv.writerow(
            [
                index,
                f"{time:.6f}",
                s.track_id,
                s.class_id,
                csv_cell(_name(self._names, s.class_id)),
                f"{s.score:.4f}",
                *(f"{v:.2f}" for v in s.box),
                "" if s.area is None else s.area,
                *(f"{v:.3f}" for v in s.centroid),
                "" if speed is None else f"{speed:.3f}",
                int(s.interpolated),
            ]
        )

    def _write_json(self, index: int, time: float, s: Sighting) -> None:
        x0, y0, x1, y1 = s.box
        annotation: dict[str, Any] = {
            "id": self._count,
            "frame": index,
            "time_s": round(time, 6),
            "track_id": s.track_id,
            "category_id": s.class_id + 1,
            "score": s.score,
            "bbox": [round(v, 2) for v in (x0, y0, x1 - x0, y1 - y0)],
            "interpolated": s.interpolated,
        }
        if s.mask is not None:
            annotation["segmentation"] = {"size": list(self._size), "counts": s.mask.counts}
            annotation["area"] = s.area
        lead = ",\n" if self._count > 1 else "\n"
        self._files[1].write(lead + json.dumps(annotation, separators=(",", ":")))

    def _write_mot(self, index: int, s: Sighting) -> None:
        """Write a line of MOT Challenge: frames count from 1."""
        x0, y0, x1, y1 = s.box
        box = f"{x0:.2f},{y0:.2f},{x1 - x0:.2f},{y1 - y0:.2f}"
        self._files[2].write(f"{index + 1},{s.track_id},{box},{s.score:.4f},-1,-1,-1\n")

    def close(self, video: dict[str, Any]) -> list[dict[str, Any]]:
        """Complete the files under their hidden names, on the disk.

        Args:
            video: describes the video in ``tracks.json``.

        Returns:
            A dict per identity.
        """
        tracks = [self.tracks[i].as_dict(self._names) for i in sorted(self.tracks)]
        tail = {"videos": [video], "tracks": tracks}
        self._files[1].write("\n], " + json.dumps(tail)[1:] + "\n")
        for file, path in zip(self._files, self._paths, strict=True):
            with disk_errors(path):
                file.flush()
                os.fsync(file.fileno())
                file.close()
        return tracks

    def discard(self) -> None:
        """Remove what was written."""
        for file, path in zip(self._files, self._paths, strict=True):
            with suppress(OSError):  # what it still holds does not fit on the disk
                file.close()
            partial_name(path).unlink(missing_ok=True)


def _name(names: Sequence[str], class_id: int) -> str:
    return names[class_id] if class_id < len(names) else str(class_id)
