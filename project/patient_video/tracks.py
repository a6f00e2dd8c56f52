"""Tracks of people in one video: read from ``tracks.json``, written to it, as columns."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

Rle = dict  # {"size": [height, width], "counts": str | bytes}, compressed as by pycocotools


@dataclasses.dataclass(frozen=True)
class Tracks:
    """Sightings of people, R in all, in order of frames; F frames were looked at.

    Attributes:
        frame: (R,) frame number of each sighting.
        time: (R,) its time stamp, s.
        track: (R,) identity.
        category: (R,) category id.
        score: (R,) confidence in [0, 1].
        box: (R, 4) XYXY, pixels.
        masks: R compressed RLE masks, None where a sighting has none.
        interpolated: (R,) True where the tracker filled a gap.
        names: category id -> name.
        size: (height, width) of the video, pixels.
        frames: (F,) rising frame numbers.
        times: (F,) their time stamps, s.
    """

    frame: np.ndarray
    time: np.ndarray
    track: np.ndarray
    category: np.ndarray
    score: np.ndarray
    box: np.ndarray
    masks: list[Rle | None]
    interpolated: np.ndarray
    names: Mapping[int, str]
    size: tuple[int, int]
    frames: np.ndarray
    times: np.ndarray

    def __len__(self) -> int:
        return len(self.frame)

    def only(self, keep: np.ndarray) -> Tracks:
        """Return the sightings that an (R,) bool or index array names; of the same frames."""
        rows = np.arange(len(self))[keep]
        columns = ("frame", "time", "track", "category", "score", "box", "interpolated")
        parts = {name: getattr(self, name)[rows] for name in columns}
        return dataclasses.replace(self, **parts, masks=[self.masks[r] for r in rows])

    def by_frame(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield each frame's position in `frames` and the rows of its sightings."""
        first = np.searchsorted(self.frame, self.frames, "left")
        last = np.searchsorted(self.frame, self.frames, "right")
        for position, (a, b) in enumerate(zip(first, last, strict=True)):
            yield position, np.arange(a, b)


def read_tracks(folder: str | os.PathLike) -> Tracks:
    """Read what ``d2kit track`` wrote.

    Args:
        folder: output folder with ``tracks.json``.

    Returns:
        The tracks, with the frames in which nobody was seen.

    Raises:
        FileNotFoundError: there is no ``tracks.json``.
        ValueError: it is not of that form, or a field is missing.
    """
    path = Path(folder) / "tracks.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not there; expected the output folder of d2kit track")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        annotations = sorted(content["annotations"], key=lambda a: (a["frame"], a["track_id"]))
        names = {int(c["id"]): str(c["name"]) for c in content["categories"]}
        info = (content.get("videos") or [{}])[0]
        return from_annotations(annotations, names, info)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: not complete JSON ({error}); was the tracking killed?"
        ) from error
    except KeyError as error:
        raise ValueError(
            f"{path}: no field {error}; expected categories and annotations with frame, time_s, "
            "track_id, category_id, score, bbox"
        ) from error


def from_annotations(
    annotations: list[dict],
    names: Mapping[int, str],
    info: Mapping | None = None,
) -> Tracks:
    """Return tracks from dicts with frame, time_s, track_id, category_id, score, bbox (XYWH).

    Args:
        annotations: one dict per sighting, in order of frames; ``segmentation`` is a compressed
            RLE, ``interpolated`` tells what fills a gap; both may be missing.
        names: category id -> name.
        info: entry of the video: ``height``, ``width``; ``first_frame``, ``last_frame``, ``stride``
            and ``fps`` of what was looked at. Without them, that is all between the sightings.
    """
    info = info or {}
    xywh = np.array([a["bbox"] for a in annotations], np.float64).reshape(-1, 4)
    masks = [a.get("segmentation") or None for a in annotations]
    frame = np.array([a["frame"] for a in annotations], np.int64)
    time = np.array([a["time_s"] for a in annotations], np.float64)
    track = np.array([a["track_id"] for a in annotations], np.int64)
    size = next((m["size"] for m in masks if m), None)
    if size is None and "height" in info:
        size = (info["height"], info["width"])
    if size is None:
        size = np.ceil(xywh[:, [1, 0]] + xywh[:, [3, 2]]).max(0) if len(xywh) else (0, 0)
    frames, times = _all_frames(frame, time, info)
    return Tracks(
        frame=frame,
        time=time,
        track=track,
        category=np.array([a["category_id"] for a in annotations], np.int64),
        score=np.array([a.get("score", 1.0) for a in annotations], np.float64),
        box=np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1),
        masks=masks,
        interpolated=np.array([bool(a.get("interpolated")) for a in annotations], bool),
        names=dict(names),
        size=(int(size[0]), int(size[1])),
        frames=frames,
        times=times,
    )


def _all_frames(
    frame: np.ndarray, time: np.ndarray, info: Mapping
) -> tuple[np.ndarray, np.ndarray]:
    """Return number and time stamp of all frames that were looked at, empty ones included."""
    seen, first = np.unique(frame, return_index=True)
    stamps = time[first]
    if {"first_frame", "last_frame", "stride", "fps"} <= set(info):
        frames = np.arange(info["first_frame"], info["last_frame"] + 1, info["stride"])
        frames = np.union1d(frames, seen)
        step = 1 / info["fps"]
        if not len(seen):
            return frames, frames * step
        times = np.interp(frames, seen, stamps)
        times += step * ((frames - seen[-1]).clip(0) - (seen[0] - frames).clip(0))
        return frames, times
    if len(seen) < 2:
        return seen, stamps
    stride = int(np.median(np.diff(seen)))
    missing = [np.arange(a + stride, b, stride) for a, b in zip(seen, seen[1:], strict=False)]
    frames = np.unique(np.concatenate([seen, *missing]))
    return frames, np.interp(frames, seen, stamps)


def as_json(tracks: Tracks) -> dict:
    """Return the content of ``tracks.json``."""
    annotations = [
        {
            "frame": int(tracks.frame[r]),
            "time_s": float(tracks.time[r]),
            "track_id": int(tracks.track[r]),
            "category_id": int(tracks.category[r]),
            "score": float(tracks.score[r]),
            "bbox": [
                float(v) for v in (*tracks.box[r, :2], *(tracks.box[r, 2:] - tracks.box[r, :2]))
            ],
            "segmentation": tracks.masks[r] and as_text(tracks.masks[r]),
            "area": _area(tracks.masks[r], tracks.box[r]),
            "interpolated": bool(tracks.interpolated[r]),
        }
        for r in range(len(tracks))
    ]
    ids, first = np.unique(tracks.track, return_index=True)
    return {
        "info": {"description": "tracks of people in a video"},
        "videos": [_video(tracks)],
        "categories": [{"id": i, "name": name} for i, name in tracks.names.items()],
        "tracks": [
            {"id": int(i), "category_id": int(tracks.category[r]), "video_id": 1}
            for i, r in zip(ids, first, strict=True)
        ],
        "annotations": annotations,
    }


def _video(tracks: Tracks) -> dict:
    info = {"id": 1, "height": tracks.size[0], "width": tracks.size[1]}
    if len(tracks.frames) > 1:
        steps, times = np.diff(tracks.frames), np.diff(tracks.times)
        info |= {
            "fps": float(steps.sum() / times.sum()),
            "first_frame": int(tracks.frames[0]),
            "last_frame": int(tracks.frames[-1]),
            "stride": int(np.median(steps)),
        }
    return info


def as_text(mask: Rle) -> Rle:
    """Return an RLE as JSON takes it, its counts as text."""
    counts = mask["counts"]
    text = counts.decode("ascii") if isinstance(counts, bytes) else counts
    return {"size": [int(v) for v in mask["size"]], "counts": text}


def _area(mask: Rle | None, box: np.ndarray) -> int:
    from pycocotools import mask as mask_util

    if mask is None:
        return int((box[2] - box[0]) * (box[3] - box[1]))
    return int(mask_util.area(mask))
