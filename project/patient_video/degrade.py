"""Ground truth made as bad as a small detector: for choosing thresholds, and for tests."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np

from project.patient_video.signals import decode_mask
from project.patient_video.tracks import Tracks, as_text


@dataclasses.dataclass(frozen=True)
class Detector:
    """How bad a detector is.

    Attributes:
        jitter: standard deviation of each side of a box, pixels.
        noise: standard deviation of the mask head's output, which is 0 outside and 1 inside.
        miss: share of sightings that are missed.
        side: mask head's resolution: a mask is `side` x `side` inside its box, as in Mask R-CNN.
    """

    jitter: float = 2.0
    noise: float = 0.15
    miss: float = 0.05
    side: int = 28


def degrade(tracks: Tracks, detector: Detector, seed: int = 0) -> Tracks:
    """Return tracks as a bad detector would have seen them, identities kept.

    Args:
        tracks: exact tracks with masks.
        detector: how bad.
        seed: of the random errors.
    """
    from pycocotools import mask as mask_util

    rng = np.random.default_rng(seed)
    keep = np.flatnonzero(rng.random(len(tracks)) >= detector.miss)
    box = tracks.box[keep] + rng.normal(0, detector.jitter, (len(keep), 4))
    height, width = tracks.size
    low = np.clip(box[:, :2], 0, [width - 2, height - 2])
    box = np.concatenate([low, np.clip(box[:, 2:], low + 2, [width, height])], 1)
    masks: list = []
    for row, corners in zip(keep, box, strict=True):
        seen = _mask_head(decode_mask(tracks, row), corners, detector, rng)
        masks.append(mask_util.encode(np.asfortranarray(seen, np.uint8)))
    scores = rng.uniform(0.5, 1.0, len(keep))
    return dataclasses.replace(tracks.only(keep), score=scores, box=box, masks=masks)


def store_detections(tracks: Tracks, path: str | os.PathLike, source: str | os.PathLike) -> None:
    """Write tracks without their identities, as ``track_video`` stores what a model detected.

    Args:
        tracks: of one video.
        path: file to write; must not exist.
        source: the video.
    """
    from d2kit.video import DetectionWriter, FrameDetections, Selection, open_source

    info = open_source(str(source), Selection()).info
    ids = sorted(tracks.names)
    header = {
        "source": Path(source).name,
        "bytes": info.bytes,
        "height": info.height,
        "width": info.width,
        "fps": info.fps,
        "selection": dataclasses.asdict(Selection()),
        "classes": [tracks.names[i] for i in ids],
        "model": "made up",
    }
    writer = DetectionWriter(Path(path), header)
    for k, rows in tracks.by_frame():
        masks = [tracks.masks[r] for r in rows]
        writer.write(
            FrameDetections(
                int(tracks.frames[k]),
                float(tracks.times[k]),
                tracks.box[rows],
                tracks.score[rows],
                np.searchsorted(ids, tracks.category[rows]),
                [as_text(m)["counts"] for m in masks],
            )
        )
    writer.close({"frames": len(tracks.frames), "problem": ""})


def _mask_head(
    mask: np.ndarray, box: np.ndarray, detector: Detector, rng: np.random.Generator
) -> np.ndarray:
    """Return a mask sampled at side x side in a box, with noise, and pasted back at 0.5."""
    import cv2

    x0, y0, x1, y1 = box
    side = detector.side
    step = np.array([x1 - x0, y1 - y0]) / side
    soft = cv2.blur(mask.astype(np.float32), tuple(int(max(1, round(s))) for s in step))
    centres = np.arange(side) + 0.5
    xs, ys = np.meshgrid(x0 + centres * step[0] - 0.5, y0 + centres * step[1] - 0.5)
    head = cv2.remap(soft, xs.astype(np.float32), ys.astype(np.float32), cv2.INTER_LINEAR)
    head += rng.normal(0, detector.noise, head.shape).astype(np.float32)
    left, top = int(x0), int(y0)
    right, bottom = min(mask.shape[1], int(np.ceil(x1))), min(mask.shape[0], int(np.ceil(y1)))
    xs, ys = np.meshgrid(
        (np.arange(left, right) + 0.5 - x0) / step[0] - 0.5,
        (np.arange(top, bottom) + 0.5 - y0) / step[1] - 0.5,
    )
    pasted = cv2.remap(
        head,
        xs.astype(np.float32),
        ys.astype(np.float32),
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REPLICATE,
    )
    out = np.zeros(mask.shape, bool)
    out[top:bottom, left:right] = pasted > 0.5
    return out
