"""Writes the synthetic ward to frames, MP4 and COCO JSON, and registers it."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from project.patient_video.ward import CLASS_NAMES, GENERATOR, Person, WardVideo

TRAIN, TEST = "patient_video_train", "patient_video_test"


@dataclasses.dataclass(frozen=True)
class WardSpec:
    """Size of the generated dataset.

    Attributes:
        seed: seed of everything.
        train_videos: videos for training; the next `test_videos` are held out.
        test_videos: held-out videos.
        seconds: length of a video.
        fps: frames per second of the MP4 files.
        width: frame width in pixels; the height is 3/4 of it.
        stride: every `stride`-th frame of a held-out video becomes an annotated image.
        train_stride: the same for the training videos: many rooms teach more than many frames.
    """

    seed: int = 0
    train_videos: int = 120
    test_videos: int = 4
    seconds: float = 20.0
    fps: float = 15.0
    width: int = 320
    stride: int = 6
    train_stride: int = 24

    def video(self, index: int) -> WardVideo:
        """Return video `index` of the dataset."""
        return WardVideo(
            self.seed,
            index,
            seconds=self.seconds,
            fps=self.fps,
            size=(self.width, self.width * 3 // 4),
            spells=1 + (self.seconds >= 30),
        )


def write_training_frames(spec: WardSpec, index: int, root: Path) -> dict:
    """Render every `train_stride`-th frame of one video to ``frames/videoNN/*.jpg``.

    Args:
        spec: the dataset.
        index: video index.
        root: output folder.

    Returns:
        ``{"video": dict, "images": list, "annotations": list}``, annotations of those frames.
    """
    video = spec.video(index)
    part = _start(spec, video, index, root)
    for k in range(0, len(video), spec.train_stride):
        rgb, people = video.render(k)
        _write_frame(root / _describe(part, people, k, spec)["file_name"], rgb)
    return part


def write_video(spec: WardSpec, index: int, root: Path) -> dict:
    """Render one video to ``videos/videoNN.mp4`` and its ground truth, and every `stride`-th frame.

    Args:
        spec: the dataset.
        index: video index.
        root: output folder.

    Returns:
        ``{"video": dict, "images": list, "annotations": list}``, annotations of every frame.
    """
    import av

    video = spec.video(index)
    part = _start(spec, video, index, root)
    (root / "videos").mkdir(exist_ok=True)
    with av.open(str(root / part["video"]["file_name"]), "w") as container:
        stream = container.add_stream("libx264", rate=round(spec.fps))
        stream.width, stream.height = video.size
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "20", "preset": "veryfast"}
        stream.thread_count = 1
        for k in range(len(video)):
            rgb, people = video.render(k)
            for packet in stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")):
                container.mux(packet)
            image = _describe(part, people, k, spec)
            if k % spec.stride == 0:
                _write_frame(root / image["file_name"], rgb)
        for packet in stream.encode():
            container.mux(packet)
    return part


def _start(spec: WardSpec, video: WardVideo, index: int, root: Path) -> dict:
    """Return the ground truth of a video of which no frame is rendered yet; make its folder."""
    import cv2

    cv2.setNumThreads(1)  # the videos are rendered in parallel, one per process
    name = f"video{index:02d}"
    (root / "frames" / name).mkdir(parents=True, exist_ok=True)
    info = {"id": index, "name": name, "fps": spec.fps, "frames": len(video)}
    info |= {"file_name": f"videos/{name}.mp4", "shaking": video.shaking()}
    return {"video": info, "images": [], "annotations": []}


def _describe(part: dict, people: list[Person], k: int, spec: WardSpec) -> dict:
    """Append frame `k` and its people to the ground truth of a video; return its image entry."""
    info = part["video"]
    image = {
        "id": info["id"] * 100_000 + k,
        "file_name": f"frames/{info['name']}/{k:06d}.jpg",
        "width": spec.width,
        "height": spec.width * 3 // 4,
        "video_id": info["id"],
        "frame_id": k,
        "time": k / spec.fps,
    }
    part["images"].append(image)
    part["annotations"] += [_annotation(image["id"], person) for person in people]
    return image


def _write_frame(path: Path, rgb: np.ndarray) -> None:
    import cv2

    if not cv2.imwrite(str(path), rgb[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92]):
        raise OSError(f"could not write {path}: is the disk full?")


def _annotation(image_id: int, person: Person) -> dict:
    from pycocotools import mask as mask_util

    rle = mask_util.encode(np.asfortranarray(person.mask.astype(np.uint8)))
    x0, y0, x1, y1 = person.box.tolist()
    return {
        "image_id": image_id,
        "category_id": person.category + 1,
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "area": int(person.mask.sum()),
        "iscrowd": 0,
        "track_id": person.identity,
        "segmentation": {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")},
    }


def _coco(parts: list[dict], stride: int) -> dict:
    """Return one COCO dict of every `stride`-th frame of some videos."""
    images = [im for part in parts for im in part["images"] if im["frame_id"] % stride == 0]
    wanted = {im["id"] for im in images}
    annotations = [a for part in parts for a in part["annotations"] if a["image_id"] in wanted]
    return {
        "info": {"description": "d2kit synthetic ward", "version": "1"},
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(CLASS_NAMES)],
        "videos": [part["video"] for part in parts],
        "images": images,
        "annotations": [{"id": i + 1, **a} for i, a in enumerate(annotations)],
    }


def _pool(workers: int) -> Executor:
    """Return processes that render in parallel, or one thread of this process.

    Processes are spawned: a fork of a process in which OpenCV has threads hangs in OpenCV.
    """
    if workers == 1:
        return ThreadPoolExecutor(1)
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))


def generate(root: Path, spec: WardSpec | None = None, workers: int | None = None) -> bool:
    """Generate the dataset under `root`; nothing is done where it is already complete.

    Writes ``train.json`` and ``test.json`` with their frames, and of each held-out video the MP4
    file and ``tracks/videoNN.json`` (every frame). Train and test never share a video.

    Args:
        root: output folder.
        spec: sizes and seed.
        workers: processes; by default one per core.

    Returns:
        True if it was generated, False if the same dataset was there.
    """
    from tqdm import tqdm

    from d2kit.utils.file_io import atomic_write

    spec = spec or WardSpec()
    done = root / "spec.json"
    wanted = json.dumps(dataclasses.asdict(spec) | {"generator": GENERATOR}, sort_keys=True)
    if done.is_file() and done.read_text() == wanted:
        return False
    root.mkdir(parents=True, exist_ok=True)
    (root / "tracks").mkdir(exist_ok=True)
    total = spec.train_videos + spec.test_videos
    with _pool(workers or os.cpu_count() or 1) as pool:
        jobs = [
            pool.submit(
                write_training_frames if i < spec.train_videos else write_video, spec, i, root
            )
            for i in range(total)
        ]
        parts = [job.result() for job in tqdm(jobs, desc="rendering ward videos", unit="video")]
    train, test = parts[: spec.train_videos], parts[spec.train_videos :]
    files = {"train.json": _coco(train, spec.train_stride), "test.json": _coco(test, spec.stride)}
    files |= {f"tracks/{part['video']['name']}.json": _coco([part], 1) for part in test}
    for file_name, content in files.items():
        with atomic_write(root / file_name, "w") as f:
            json.dump(content, f)
    with atomic_write(done, "w") as f:
        f.write(wanted)
    return True


def register(root: str | os.PathLike | None = None) -> None:
    """Register ``patient_video_train`` and ``patient_video_test``."""
    from d2kit.data.datasets import register_coco_instances
    from project.datasets_root import datasets_root

    folder = datasets_root(root) / "patient_video"
    for name, file_name in ((TRAIN, "train.json"), (TEST, "test.json")):
        register_coco_instances(
            name,
            {"thing_classes": list(CLASS_NAMES), "thing_colors": [[235, 96, 60], [40, 130, 230]]},
            str(folder / file_name),
            str(folder),
        )
