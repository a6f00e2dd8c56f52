"""Which source of frames a name means."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2kit.utils.file_io import atomic_write
from d2kit.video.outputs import disk_errors
from d2kit.video.overlay import IMAGE_SUFFIXES, Camera, PictureFolder, encode_jpeg
from d2kit.video.video_file import Frame, FrameSource, Selection, VideoFile

if TYPE_CHECKING:
    pass

__all__ = ["open_source"]


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
    path = Path(name)
    if name.startswith("/dev/video") or (name.isdigit() and not path.exists()):
        return Camera(name, selection)
    if "://" in name and not path.exists():
        raise ValueError(f"--input {name}: a URL; copy the video to this machine first")
    if path.is_dir():
        return PictureFolder(path, selection, fps)
    if not path.exists():
        raise FileNotFoundError(f"--input {name}: no such file or folder")
    if path.suffix.lower() in IMAGE_SUFFIXES:
        raise ValueError(
            f"--input {name}: a still picture; d2kit predict takes pictures, this takes a "
            "video, a folder whose pictures are its frames, or a camera"
        )
    if os.path.getsize(path) == 0:
        raise ValueError(f"--input {name}: the file is empty (0 bytes), expected a video")
    return VideoFile(path, selection)


def extract_frames(
    videos: Sequence[Path],
    output: Path,
    *,
    every: int = 1,
    fps: float | None = None,
    quality: int = 95,
    progress: Callable[[int], object] = lambda done: None,
) -> dict[str, Any]:
    """Write frames to ``OUTPUT/frames/VIDEO/000123.jpg`` and ``OUTPUT/frames.json``.

    Args:
        videos: files that FFmpeg reads, with different names.
        output: folder.
        every: every N-th frame, at least 1.
        fps: pictures per second by the time stamps of the file, in place of `every`.
        quality: of the JPEG files, 1..100.
        progress: called with 1 for each picture.

    Returns:
        What ``frames.json`` holds: "videos" (with ``problem`` where one ended early or could not be
        read: that one has 0 frames, the others have theirs), "images" with ``video_id``,
        ``frame_id``, ``time`` (s); "annotations" and "categories" are empty, for the annotator.

    Raises:
        ValueError: if two videos have the same name, a number is out of range, or none of them can
            be read.
    """
    _check(videos, fps, quality)
    coco: dict[str, Any] = {"videos": [], "images": [], "annotations": [], "categories": []}
    Selection(stride=every)  # refuses what is out of range
    for number, video in enumerate(videos, start=1):
        entry = {"id": number, "name": video.stem, "file_name": str(video), "fps": 0.0}
        entry |= {"frames": 0, "problem": ""}
        coco["videos"].append(entry)
        try:
            source = open_source(str(video), Selection(stride=1 if fps else every))
        except (ValueError, OSError) as error:
            entry["problem"] = str(error)
            continue
        entry |= {"fps": source.info.fps, "sample_aspect_ratio": source.info.aspect}
        for frame in source if fps is None else _timed(source, fps):
            file_name = f"frames/{video.stem}/{frame.index:06d}.jpg"
            height, width = _write(output / file_name, frame.image, quality, source.info.aspect)
            image = {"id": len(coco["images"]) + 1, "file_name": file_name}
            image |= {"height": height, "width": width, "video_id": number}
            coco["images"].append(image | {"frame_id": frame.index, "time": round(frame.time, 6)})
            progress(1)
        entry |= {"frames": source.seen, "problem": source.problem}
    if not coco["images"]:
        problems = "; ".join(v["problem"] for v in coco["videos"] if v["problem"])
        raise ValueError(f"no frame of {len(videos)} videos could be read: {problems}")
    output.mkdir(parents=True, exist_ok=True)
    with atomic_write(output / "frames.json", "w") as f:
        json.dump(coco, f)
    return coco


def _check(videos: Sequence[Path], fps: float | None, quality: int) -> None:
    names = [video.stem for video in videos]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two videos are named '{twice[0]}': their frames need different folders")
    if fps is not None and not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"--fps must be a number above 0, got {fps}")
    if not 1 <= quality <= 100:
        raise ValueError(f"--quality must lie in 1..100, got {quality}")


def _timed(frames: Iterable[Frame], fps: float) -> Iterator[Frame]:
    """Leave out frames until the next one is due."""
    due = None
    for frame in frames:
        if due is None or frame.time + 1e-6 >= due:
            yield frame
            due = (frame.time if due is None else due) + 1 / fps


def _write(path: Path, bgr: Any, quality: int, aspect: float) -> tuple[int, int]:
    """Write a picture; return its height and width."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(path):
        path.write_bytes(encode_jpeg(bgr, quality, aspect))
    found: tuple[int, int] = bgr.shape[:2]
    return found
