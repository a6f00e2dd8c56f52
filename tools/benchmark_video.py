#!/usr/bin/env python3
"""Speed and memory of tracking a long video from stored detections: association, drawing, H.264.

A synthetic ward of 640 x 480 pixels at 30 frames per second is rendered for some seconds and
repeated; its exact masks, with noise, are the stored detections. The run is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

FPS, SIZE, SECONDS = 30.0, (640, 480), 20.0


def prepare(folder: Path, frames: int) -> None:
    """Write ``ward.mp4`` and its stored detections, `frames` long."""
    import av
    from pycocotools import mask as mask_util

    from d2kit.video import DETECTIONS, DetectionWriter, FrameDetections
    from project.patient_video.ward import CLASS_NAMES, WardVideo

    ward = WardVideo(0, 2, seconds=SECONDS, fps=FPS, size=SIZE)
    rng = np.random.default_rng(0)
    header = {
        **{"source": "ward.mp4", "bytes": 1, "width": SIZE[0], "height": SIZE[1], "fps": FPS},
        **{"selection": {}, "classes": list(CLASS_NAMES), "model": "truth"},
    }
    (folder / DETECTIONS).unlink(missing_ok=True)
    writer = DetectionWriter(folder / DETECTIONS, header)
    scene = []
    with av.open(str(folder / "ward.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=round(FPS))
        (stream.width, stream.height), stream.pix_fmt = SIZE, "yuv420p"
        stream.options = {"crf": "23", "preset": "ultrafast"}
        for k in range(frames):
            if k < len(ward):
                rgb, people = ward.render(k)
                picture = av.VideoFrame.from_ndarray(rgb, format="rgb24").reformat(format="yuv420p")
                encoded = [mask_util.encode(np.asfortranarray(p.mask, np.uint8)) for p in people]
                scene.append((picture, people, [rle["counts"].decode() for rle in encoded]))
            picture, people, masks = scene[k % len(ward)]
            picture.pts = k
            for packet in stream.encode(picture):
                container.mux(packet)
            boxes = np.array([p.box for p in people]).reshape(-1, 4)
            boxes = boxes + rng.normal(0, 0.5, boxes.shape)
            scores = rng.uniform(0.8, 1, len(people))
            classes = np.array([p.category for p in people], np.int64)
            writer.write(FrameDetections(k, k / FPS, boxes, scores, classes, masks))
        for packet in stream.encode():
            container.mux(packet)
    writer.close({"frames": frames, "problem": ""})


def peak_kib() -> int:
    """Return the largest resident memory of this process so far, KiB.

    Not getrusage's: that one starts with the parent's.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def measure(folder: Path, tracker: str, preset: str) -> None:
    """Track; print a line of JSON: rate, CPU time, and peak memory as it grew."""
    import cv2

    from d2kit.config import get_cfg
    from d2kit.video import TRACKERS, VideoOptions, track_video

    cv2.setNumThreads(1)
    cfg = get_cfg()
    cfg.TRACKER_HEADS.TRACKER_NAME = TRACKERS[tracker]
    peaks: list[tuple[int, int]] = []

    def note(count: int) -> None:
        if count % 300 == 0:
            peaks.append((count, peak_kib()))

    options = VideoOptions(
        input=str(folder / "ward.mp4"), output=folder, from_detections=True, preset=preset
    )
    began = time.perf_counter()
    summary = track_video(cfg, options, on_frame=note)
    wall, cpu = time.perf_counter() - began, time.process_time()
    frames = summary["frames"]
    two_minutes = min(round(120 * FPS), frames // 2)
    early = [peak for count, peak in peaks if count <= two_minutes][-1]
    result = {
        "frames": frames,
        "identities": summary["identities"],
        "frames_per_second": round(frames / wall, 1),
        "cpu_ms_per_frame": round(1000 * cpu / frames, 2),
        "peak_mib_early": round(early / 1024, 1),
        "early_frame": two_minutes,
        "peak_mib_end": round(peaks[-1][1] / 1024, 1),
        "growth": round(peaks[-1][1] / early - 1, 4),
        "cores": len(os.sched_getaffinity(0)),
    }
    print(json.dumps(result))


def main() -> None:
    """Prepare and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=54_000, help="54,000: half an hour")
    parser.add_argument("--tracker", default="bytetrack")
    parser.add_argument("--preset", default="veryfast")
    parser.add_argument("--folder", type=Path, help="kept; default: a temporary one")
    parser.add_argument("--measure-only", action="store_true", help="the folder is prepared")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if args.measure_only:
            measure(folder, args.tracker, args.preset)
            return
        prepare(folder, args.frames)
        command = [sys.executable, __file__, "--measure-only", "--folder", str(folder)]
        command += ["--tracker", args.tracker, "--preset", args.preset]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
