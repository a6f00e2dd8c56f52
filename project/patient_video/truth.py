"""Ground truth of ward videos as tracks, and in the formats that tracking is scored with."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from project.patient_video.shaking import Span
from project.patient_video.tracks import Tracks, as_json, from_annotations
from project.patient_video.ward import CLASS_NAMES, PATIENT, WardVideo

NAMES = {i + 1: name for i, name in enumerate(CLASS_NAMES)}
PATIENT_ID = PATIENT + 1


def ward_truth(video: WardVideo) -> Tracks:
    """Return everybody in every frame of a ward video; renders it."""
    from pycocotools import mask as mask_util

    annotations = []
    for k in range(len(video)):
        for person in video.render(k)[1]:
            x0, y0, x1, y1 = person.box.tolist()
            annotations.append(
                {
                    "frame": k,
                    "time_s": k / video.fps,
                    "track_id": person.identity,
                    "category_id": person.category + 1,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "segmentation": mask_util.encode(np.asfortranarray(person.mask, np.uint8)),
                }
            )
    return from_annotations(annotations, NAMES)


def read_truth(path: str | os.PathLike) -> tuple[Tracks, list[Span]]:
    """Read ``tracks/videoNN.json`` of the prepared ward.

    Args:
        path: COCO JSON of every frame of one video.

    Returns:
        Everybody in every frame, and the spells of shaking.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no ground truth of one video.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{path}: not there; `python datasets/prepare_patient_video.py` writes one per "
            "held-out video"
        )
    coco = json.loads(Path(path).read_text(encoding="utf-8"))
    if len(coco.get("videos", ())) != 1 or "shaking" not in coco["videos"][0]:
        raise ValueError(f"{path}: expected the ground truth of one ward video, with its shaking")
    images = {image["id"]: image for image in coco["images"]}
    annotations = [
        {**a, "frame": images[a["image_id"]]["frame_id"], "time_s": images[a["image_id"]]["time"]}
        for a in coco["annotations"]
    ]
    names = {c["id"]: c["name"] for c in coco["categories"]}
    annotations.sort(key=lambda a: (a["frame"], a["track_id"]))
    return from_annotations(annotations, names), spans(coco["videos"][0]["shaking"])


def spans(shaking: list[dict[str, float]]) -> list[Span]:
    """Return the spells of shaking as the ward states them."""
    return [Span(s["start"], s["end"], s["frequency"]) for s in shaking]


def write_mot(tracks: Tracks, path: str | os.PathLike) -> None:
    """Write MOT text: frame from 1, identity, x, y, width, height, score, class 1, visibility 1.

    Everybody is of class 1, the one that MOT's metrics count.
    """
    from d2kit.utils.file_io import atomic_write

    rows = [
        f"{tracks.frame[r] + 1},{tracks.track[r]},"
        + ",".join(
            f"{v:.2f}" for v in (*tracks.box[r, :2], *(tracks.box[r, 2:] - tracks.box[r, :2]))
        )
        + f",{tracks.score[r]:.4f},1,1\n"
        for r in range(len(tracks))
    ]
    with atomic_write(path, "w") as file:
        file.writelines(rows)


def write_coco_video(tracks: Tracks, path: str | os.PathLike) -> None:
    """Write COCO-style JSON with one annotation per sighting, as ``tracks.json`` has."""
    from d2kit.utils.file_io import atomic_write

    with atomic_write(path, "w") as file:
        json.dump(as_json(tracks), file)
