"""One command from a video to its tracks: decode, detect, associate, draw and encode at once."""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from d2kit.config import CfgNode
from d2kit.engine.resolve import build_class_names
from d2kit.utils.file_io import atomic_write
from d2kit.video.association import Associator, TrackedFrame, build_associator
from d2kit.video.detections import DetectionStore, DetectionWriter, build_detector
from d2kit.video.feed import DetectionFeed, Pair
from d2kit.video.frames import Frame, FrameSource, Selection
from d2kit.video.lock import sole_writer
from d2kit.video.outputs import TrackWriter, VideoEncoder
from d2kit.video.overlay import draw_tracks
from d2kit.video.plan import (
    VideoOptions,
    build_header,
    info_is_camera,
    stored_detections,
)
from d2kit.video.privacy import Anonymizer, Background
from d2kit.video.sources import open_source

__all__ = ["COMPLETE", "DAMAGED", "INTERRUPTED", "track_video"]

logger = logging.getLogger(__name__)

COMPLETE, DAMAGED, INTERRUPTED = "complete", "input damaged", "interrupted"
"""How a run ended: `summary["status"]`."""

_QUEUED_BYTES = 2**26  # of frames between two stages


class _Drawer:
    """Hides whom the options want hidden, keeps the frame if asked, draws the tracks."""

    def __init__(self, options: VideoOptions, names: list[str], size: tuple[int, int]) -> None:
        self._names, self._size = names, size
        self._hide = None
        if options.blur is not None:
            self._hide = Anonymizer(
                options.blur, subject=options.subject, classes=options.people(names)
            )
        self._folder = options.output / "frames" if options.keep_frames else None
        if self._folder is not None:
            self._folder.mkdir(exist_ok=True)

    def __call__(self, tracked: TrackedFrame) -> np.ndarray:
        image = tracked.frame.image
        assert image is not None, "frames without a picture are not drawn"
        hidden: set[int] = set()
        if self._hide is not None:
            image, hidden = self._hide(tracked, self._size), self._hide.hidden(tracked.sightings)
        if self._folder is not None:
            self._keep(image, self._folder / f"{tracked.frame.index:06d}.jpg")
        draw_tracks(image, tracked.sightings, self._names, tracked.frame.time, untinted=hidden)
        return image

    @staticmethod
    def _keep(image: np.ndarray, path: Path) -> None:
        import cv2

        if not cv2.imwrite(str(path), image, [cv2.IMWRITE_JPEG_QUALITY, 95]):
            raise OSError(f"could not write {path}: is the disk full?")


def _until(frames: Iterable[Frame], stop: threading.Event) -> Iterator[Frame]:
    for frame in frames:
        if stop.is_set():
            return
        yield frame


def _associated(pairs: Iterable[Pair], associator: Associator) -> Iterator[TrackedFrame]:
    for frame, found in pairs:
        yield from associator.push(frame, found)
    yield from associator.flush()


@dataclasses.dataclass
class _Done:
    """Which frames came out: how many, the number of the first and of the last."""

    count: int = 0
    first: int = 0
    last: int = 0

    def add(self, index: int) -> None:
        """Count one."""
        self.first = index if self.count == 0 else self.first
        self.count, self.last = self.count + 1, index


@dataclasses.dataclass
class _Setup:
    """What a run needs, put together."""

    source: FrameSource | None
    store: DetectionStore | None
    header: dict[str, Any]
    names: list[str]
    size: tuple[int, int]
    fps: float
    expected: int | None


def _prepare(cfg: CfgNode, options: VideoOptions, associator_needs_image: bool) -> _Setup:
    """Open what is read; every mistake of the user shows here, before anything is written."""
    if not options.from_detections:
        source = open_source(options.input, options.selection, options.fps)
        info, names = source.info, build_class_names(cfg)
        header = build_header(cfg, info, options.selection, names)
        store = stored_detections(options, header)
        return _Setup(
            source, store, header, names, (info.height, info.width), info.fps, info.expected
        )
    store = DetectionStore(options.store)
    header = store.header
    names, fps = list(header.get("classes", [])), float(header.get("fps", 25.0))
    selection = Selection(**header.get("selection", {}))
    if options.selection not in (Selection(), selection):
        raise ValueError(
            f"--from-detections: {options.store} holds {selection}; --stride, --start and --end "
            "cannot differ"
        )
    if not options.draws and not associator_needs_image:
        return _Setup(None, store, header, names, store.size, fps, None)
    source = open_source(options.input, selection, fps)
    size = (source.info.height, source.info.width)
    if size != store.size:
        raise ValueError(
            f"{options.store}: the stored detections are of a video of "
            f"{store.size[1]}x{store.size[0]} pixels, {options.input} has {size[1]}x{size[0]}"
        )
    return _Setup(source, store, header, names, size, fps, source.info.expected)


def track_video(
    cfg: CfgNode,
    options: VideoOptions,
    *,
    stop: threading.Event | None = None,
    on_frame: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Follow everybody through a video.

    Frames are decoded, detected, associated, drawn and encoded in threads with bounded queues
    between them. Detections are stored as they come; the other files take their names at the end.
    The same call after a kill reads what is stored and detects only the rest: identities do not
    differ from those of an undisturbed run.

    Args:
        cfg: the config: the model, and ``TRACKER_HEADS``.
        options: what to read and write.
        stop: set from outside, it ends the run after the frames at hand; all files are finished.
        on_frame: called with the number of frames that are done.

    Returns:
        What ``summary.json`` holds; ``status`` is `COMPLETE`, `DAMAGED` or `INTERRUPTED`.

    Raises:
        FileNotFoundError, ValueError: for a mistake in input or options, before anything is
            written; for a video without a frame.
    """
    tracker_probe = build_associator(cfg, (1, 1))
    setup = _prepare(cfg, options, tracker_probe.needs_image)
    options.output.mkdir(parents=True, exist_ok=True)
    with sole_writer(options.output):
        return _track(cfg, options, setup, stop or threading.Event(), on_frame)


def _track(
    cfg: CfgNode,
    options: VideoOptions,
    setup: _Setup,
    stop: threading.Event,
    on_frame: Callable[[int], None] | None,
) -> dict[str, Any]:
    """Write everything; of a run that fails, only the detections are kept."""
    began = time.perf_counter()
    detections = DetectionFeed(
        options,
        setup.store,
        lambda: DetectionWriter(options.store, setup.header, append=setup.store),
        lambda: build_detector(cfg)[0],
    )
    writer = TrackWriter(options.output, size=setup.size, names=setup.names)
    encoder = _encoder(options, setup)
    try:
        frames = _run(cfg, options, setup, detections, writer, encoder, stop, on_frame)
        if frames.count == 0:
            why = f": {detections.problem}" if detections.problem else ""
            raise ValueError(f"{options.input or options.store}: 0 frames could be read{why}")
        if encoder is not None:
            encoder.close()
    except BaseException:
        writer.discard()
        if encoder is not None:
            encoder.discard()
        if detections.file is not None:
            detections.file.close()  # the next run goes on from here
        raise
    return _finish(options, setup, detections, writer, frames, stop, time.perf_counter() - began)


def _encoder(options: VideoOptions, setup: _Setup) -> VideoEncoder | None:
    if not options.video:
        return None
    return VideoEncoder(
        options.output / "annotated.mp4",
        width=setup.size[1],
        height=setup.size[0],
        fps=setup.fps / options.selection.stride,
        preset=options.preset,
        crf=options.crf,
    )


def _run(
    cfg: CfgNode,
    options: VideoOptions,
    setup: _Setup,
    detections: DetectionFeed,
    writer: TrackWriter,
    encoder: VideoEncoder | None,
    stop: threading.Event,
    on_frame: Callable[[int], None] | None,
) -> _Done:
    """Run the stages; return which frames came out."""
    from tqdm import tqdm

    depth = min(16, max(2, _QUEUED_BYTES // (3 * setup.size[0] * setup.size[1])))
    stages: list[Background] = []

    def stage(items: Iterable[Any], name: str) -> Background:
        stages.append(Background(items, depth, name))
        return stages[-1]

    drawer = _Drawer(options, setup.names, setup.size) if options.draws else None
    associator = build_associator(cfg, setup.size)
    if setup.source is None:
        pairs = stage(detections.alone(), "read")
    else:
        decoded = stage(_until(setup.source, stop), "decode")
        pairs = stage(detections.join(decoded), "detect")
    tracked = stage(_associated(pairs, associator), "associate")
    drawn = stage(((t, drawer(t) if drawer else None) for t in tracked), "draw")
    done = _Done()
    hidden = None if options.progress else True
    try:
        with tqdm(
            total=setup.expected, desc="tracking", unit="frame", disable=hidden, smoothing=0.05
        ) as bar:
            for item, image in drawn:
                writer.write(item)
                if encoder is not None:
                    encoder.write(image, item.frame.time)
                done.add(item.frame.index)
                bar.update()
                if on_frame is not None:
                    on_frame(done.count)
    finally:
        for one in stages:
            one.stop()
        for one in stages:
            one.close()
    return done


def _finish(
    options: VideoOptions,
    setup: _Setup,
    detections: DetectionFeed,
    writer: TrackWriter,
    frames: _Done,
    stop: threading.Event,
    seconds: float,
) -> dict[str, Any]:
    """Write what is written at the end; return the summary."""
    source = setup.source
    problem = "; ".join(p for p in (source.problem if source else "", detections.problem) if p)
    damaged = source.damaged if source else 0
    status = INTERRUPTED if stop.is_set() else DAMAGED if problem or damaged else COMPLETE
    if detections.file is not None:
        whole = status != INTERRUPTED or info_is_camera(setup.header)
        detections.file.close({"frames": frames.count, "problem": problem} if whole else None)
    size = {"width": setup.size[1], "height": setup.size[0]}
    name = setup.header.get("source", "")
    stride = (setup.header.get("selection") or {}).get("stride", 1)
    video = {"id": 1, "name": name, **size, "fps": setup.fps, "frames": frames.count}
    video |= {"stride": stride, "first_frame": frames.first, "last_frame": frames.last}
    tracks = writer.close(video)
    summary = {
        "status": status,
        "problem": problem,
        "damaged_places": damaged,
        "source": name,
        **size,
        "fps": setup.fps,
        "selection": setup.header.get("selection"),
        "frames": frames.count,
        "frames_in_source": source.seen if source else None,
        "frames_detected": detections.detected,
        "frames_from_store": detections.stored,
        "blur": options.blur,
        "subject": options.subject,
        "identities": len(tracks),
        "seconds": round(seconds, 3),
        "frames_per_second": round(frames.count / seconds, 2),
        "tracks": tracks,
    }
    with atomic_write(options.output / "summary.json", "w") as file:
        json.dump(summary, file, indent=1)
    return summary
