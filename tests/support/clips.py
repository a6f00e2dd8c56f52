"""Small videos with exact ground truth, and detections made from it, for the tests of video."""

from __future__ import annotations

import functools
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from pycocotools import mask as mask_util

from d2kit.config import get_cfg
from d2kit.video import DETECTIONS, DetectionWriter, FrameDetections, VideoOptions
from project.patient_video.ward import WardVideo

SIZE = (160, 120)  # width, height
FPS = 15.0
NAMES = ["patient", "staff"]


@functools.cache
def ward_frames(seconds=4.0, video=2, size=SIZE):
    """Return [(image BGR, people)] of a ward video."""
    ward = WardVideo(0, video, seconds=seconds, fps=FPS, size=size)
    rendered = [ward.render(i) for i in range(len(ward))]
    return [(np.ascontiguousarray(rgb[..., ::-1]), people) for rgb, people in rendered]


def write_video(path, images, times=None, *, options=None, rotation=0, codec="libx264"):
    """Encode BGR images, at FPS or with the time stamps given (seconds)."""
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=round(FPS))
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "18", "preset": "ultrafast", "g": "10"} if codec != "mpeg4" else {}
        if rotation:
            stream.set_display_rotation(rotation)
        base = Fraction(1, 1000) if times is not None else Fraction(1, round(FPS))
        stream.codec_context.time_base = base
        for k, image in enumerate(images):
            picture = av.VideoFrame.from_ndarray(image, format="bgr24")
            picture.pts = round(times[k] * 1000) if times is not None else k
            picture.time_base = base
            for packet in stream.encode(picture):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def detections_of(people, index, time, rng=None, miss=0.0):
    """Return ground truth as detections: shuffled, jittered and incomplete where `rng` is given."""
    boxes = np.array([p.box for p in people]).reshape(-1, 4)
    classes = np.array([p.category for p in people], np.int64)
    scores = np.full(len(people), 0.95)
    masks = [
        mask_util.encode(np.asfortranarray(p.mask.astype(np.uint8)))["counts"].decode()
        for p in people
    ]
    order = np.arange(len(people))
    if rng is not None:
        boxes = boxes + rng.normal(0, 0.5, boxes.shape)
        scores = rng.uniform(0.8, 1.0, len(people))
        order = rng.permutation(np.flatnonzero(rng.random(len(people)) >= miss))
    return FrameDetections(
        index, time, boxes[order], scores[order], classes[order], [masks[i] for i in order]
    )


def header(size=SIZE, **changes):
    return {
        "source": "clip.mp4",
        "bytes": 1,
        "width": size[0],
        "height": size[1],
        "fps": FPS,
        "selection": {"stride": 1, "start": 0.0, "end": None},
        "classes": NAMES,
        "model": "truth",
        **changes,
    }


def store_truth(folder: Path, frames, seed=0, miss=0.05, size=SIZE, times=None, member=64):
    """Write a store with noisy ground truth of [(image, people)]; return its path."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    writer = DetectionWriter(folder / DETECTIONS, header(size), frames=member)
    for k, (_, people) in enumerate(frames):
        time = k / FPS if times is None else times[k]
        writer.write(detections_of(people, k, time, rng, miss))
    writer.close({"frames": len(frames), "problem": ""})
    return folder / DETECTIONS


def tracking_cfg(**keys):
    cfg = get_cfg()
    for key, value in keys.items():
        cfg.merge_from_list([f"TRACKER_HEADS.{key}", value])
    return cfg


def quiet(input_path, output, **changes):
    """Return options for a run from stored detections, without a progress bar."""
    settings = {"from_detections": True, "progress": False, "preset": "ultrafast", **changes}
    return VideoOptions(input=str(input_path), output=Path(output), **settings)
