"""Frames of videos as pictures, with a COCO JSON file that knows which video each is from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from d2kit.utils.file_io import atomic_write
from d2kit.video.frames import Frame, Selection
from d2kit.video.sources import open_source

__all__ = ["extract_frames"]


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
        every: every how manieth frame, at least 1.
        fps: pictures per second by the time stamps of the file, in place of `every`.
        quality: of the JPEG files, 1..100.
        progress: called with 1 for each picture.

    Returns:
        What ``frames.json`` holds: "videos" (with ``problem`` where one ended early), "images" with
        ``video_id``, ``frame_id``, ``time`` (s); "annotations" and "categories" are empty, for the
        annotator.

    Raises:
        ValueError: if two videos have the same name, a number is out of range, or one of them is no
            video; what was written for those before it stays.
    """
    names = [video.stem for video in videos]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two videos are named '{twice[0]}': their frames need different folders")
    if fps is not None and fps <= 0:
        raise ValueError(f"fps: expected a positive number, got {fps}")
    coco: dict[str, Any] = {"videos": [], "images": [], "annotations": [], "categories": []}
    for number, video in enumerate(videos, start=1):
        source = open_source(str(video), Selection(stride=1 if fps else every))
        for frame in source if fps is None else _timed(source, fps):
            file_name = f"frames/{video.stem}/{frame.index:06d}.jpg"
            height, width = _write(output / file_name, frame.image, quality)
            image = {"id": len(coco["images"]) + 1, "file_name": file_name}
            image |= {"height": height, "width": width, "video_id": number}
            coco["images"].append(image | {"frame_id": frame.index, "time": round(frame.time, 6)})
            progress(1)
        entry = {"id": number, "name": video.stem, "file_name": str(video), "fps": source.info.fps}
        coco["videos"].append(entry | {"frames": source.seen, "problem": source.problem})
    output.mkdir(parents=True, exist_ok=True)
    with atomic_write(output / "frames.json", "w") as f:
        json.dump(coco, f)
    return coco


def _timed(frames: Iterable[Frame], fps: float) -> Iterator[Frame]:
    """Leave out frames until the next one is due."""
    due = None
    for frame in frames:
        if due is None or frame.time + 1e-6 >= due:
            yield frame
            due = (frame.time if due is None else due) + 1 / fps


def _write(path: Path, bgr: Any, quality: int) -> tuple[int, int]:
    """Write a picture; return its height and width."""
    import cv2

    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), bgr, [cv2.IMWRITE_JPEG_QUALITY, quality]):
        raise OSError(f"could not write {path}: is the disk full?")
    return bgr.shape[:2]
