"""One command from a video to its tracks: decode, detect, associate, draw and encode at once."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np

from d2kit.config import CfgNode
from d2kit.engine.safety.run_lock import sole_run
from d2kit.predict.predictor import build_class_names
from d2kit.video.association import Associator, TrackedFrame, build_associator
from d2kit.video.detections import DetectionStore, DetectionWriter, FrameDetections, build_detector
from d2kit.video.outputs import (
    FRAMES,
    TrackWriter,
    VideoEncoder,
    clear_results,
    disk_errors,
    partial_name,
    publish,
)
from d2kit.video.overlay import draw_tracks, encode_jpeg
from d2kit.video.plan import (
    VideoOptions,
    build_header,
    info_is_camera,
    stored_detections,
)
from d2kit.video.privacy import Anonymizer, Background
from d2kit.video.sources import open_source
from d2kit.video.video_file import Frame, FrameSource, Selection

__all__ = ["COMPLETE", "DAMAGED", "INTERRUPTED", "track_video"]


logger = logging.getLogger(__name__)

COMPLETE, DAMAGED, INTERRUPTED = "complete", "input damaged", "interrupted"
"""How a run ended: `summary["status"]`."""

_QUEUED_BYTES = 2**26  # of frames between two stages


def _hider(options: VideoOptions, names: list[str]) -> Anonymizer | None:
    if options.blur is None:
        return None
    people = options.people(names)
    return Anonymizer(options.blur, subject=options.subject, classes=people)


class _Drawer:
    """Hides whom the options want hidden, keeps the frame if asked, draws the tracks."""

    def __init__(
        self, options: VideoOptions, names: list[str], size: tuple[int, int], aspect: float
    ) -> None:
        self._names, self._size = names, size
        self._hide = _hider(options, names)
        self._folder = options.output / FRAMES if options.keep_frames else None
        self._aspect = aspect
        if self._folder is not None:
            partial_name(self._folder).mkdir()

    def __call__(self, tracked: TrackedFrame) -> np.ndarray:
        image = tracked.frame.image
        assert image is not None, "frames without a picture are not drawn"
        hidden_ids: set[int] = set()
        if self._hide is not None:
            image = self._hide(tracked, self._size)
            hidden_ids = self._hide.hidden(tracked.sightings)
        if self._folder is not None:
            path = self._folder / f"{tracked.frame.index:06d}.jpg"
            with disk_errors(path):
                hidden = partial_name(self._folder) / path.name
                hidden.write_bytes(encode_jpeg(image, 95, self._aspect))
        draw_tracks(image, tracked.sightings, self._names, tracked.frame.time, untinted=hidden_ids)
        return image


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
    """Which frames came out: how many, the number of the first and of the last; what was found."""

    count: int = 0
    first: int = 0
    last: int = 0
    detections: int = 0
    best: float = 0.0

    def add(self, tracked: TrackedFrame) -> None:
        """Count one."""
        index, scores = tracked.frame.index, tracked.found.scores
        self.first = index if self.count == 0 else self.first
        self.count, self.last = self.count + 1, index
        self.detections += len(scores)
        self.best = max(self.best, float(scores.max(initial=0.0)))


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
    aspect: float


def _prepare(cfg: CfgNode, options: VideoOptions, associator_needs_image: bool) -> _Setup:
    """Open what is read; every mistake of the user shows here, before anything is written."""
    if not options.from_detections:
        source = open_source(options.input, options.selection, options.fps)
        info, names = source.info, build_class_names(cfg)
        header = build_header(cfg, info, options.selection, names)
        store = stored_detections(options, header)
        size = (info.height, info.width)
        return _Setup(source, store, header, names, size, info.fps, info.expected, info.aspect)
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
        aspect = float(header.get("aspect", 1.0))
        return _Setup(None, store, header, names, store.size, fps, None, aspect)
    source = open_source(options.input, selection, fps)
    size = (source.info.height, source.info.width)
    if size != store.size:
        raise ValueError(
            f"{options.store}: the stored detections are of a video of "
            f"{store.size[1]}x{store.size[0]} pixels, {options.input} has {size[1]}x{size[0]}"
        )
    info = source.info
    return _Setup(source, store, header, names, size, fps, info.expected, info.aspect)


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

    What an earlier run left in the folder is removed before the first frame is read, but for the
    stored detections; results appear all together at the end, or not at all.

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
        BlockingIOError: if another run, be it a training, holds the folder.
        OSError: if the disk is full, with path and sizes; no result is left, the stored detections
            are.
    """
    tracker_probe = build_associator(cfg, (1, 1))
    setup = _prepare(cfg, options, tracker_probe.needs_image)
    _hider(options, setup.names)  # its mistakes show before anything is removed
    options.output.mkdir(parents=True, exist_ok=True)
    with sole_run(options.output):
        hides = options.keep_frames or options.blur is not None
        clear_results(options.output, options.input, frames=hides)
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
    encoder = None
    try:
        encoder = _encoder(options, setup)
        frames = _run(cfg, options, setup, detections, writer, encoder, stop, on_frame)
        if frames.count == 0:
            why = f": {detections.problem}" if detections.problem else ""
            raise ValueError(f"{options.input or options.store}: 0 frames could be read{why}")
        if encoder is not None:
            with disk_errors(options.output / "annotated.mp4"):
                encoder.complete()
        seconds = time.perf_counter() - began
        return _finish(options, setup, detections, writer, frames, stop, seconds)
    except BaseException:
        writer.discard()
        if encoder is not None:
            encoder.discard()
        shutil.rmtree(partial_name(options.output / FRAMES), ignore_errors=True)
        if detections.file is not None:
            with suppress(OSError):  # the disk is full
                detections.file.close()  # the next run goes on from here
        raise


def _encoder(options: VideoOptions, setup: _Setup) -> VideoEncoder | None:
    if not options.video:
        return None
    return VideoEncoder(
        options.output / "annotated.mp4",
        width=setup.size[1],
        height=setup.size[0],
        fps=setup.fps / (setup.header.get("selection") or {}).get("stride", 1),
        aspect=setup.aspect,
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
    stages: list[Background[Any]] = []

    def stage(items: Iterable[Any], name: str) -> Background[Any]:
        stages.append(Background(items, depth, name))
        return stages[-1]

    names, size, aspect = setup.names, setup.size, setup.aspect
    drawer = _Drawer(options, names, size, aspect) if options.draws else None
    associator = build_associator(cfg, size, aspect)
    video = options.output / "annotated.mp4"
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
                    with disk_errors(video):
                        encoder.write(image, item.frame.time)
                done.add(item)
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
    video |= {"sample_aspect_ratio": setup.aspect}
    tracks = writer.close(video)
    summary = {
        "status": status,
        "problem": problem,
        "damaged_places": damaged,
        "source": name,
        **size,
        "sample_aspect_ratio": setup.aspect,
        "fps": setup.fps,
        "selection": setup.header.get("selection"),
        "frames": frames.count,
        "frames_in_source": source.seen if source else None,
        "frames_detected": detections.detected,
        "frames_from_store": detections.stored,
        "blur": options.blur,
        "subject": options.subject,
        "identities": len(tracks),
        "detections": frames.detections,
        "best_score": round(frames.best, 4),
        "seconds": round(seconds, 3),
        "frames_per_second": round(frames.count / seconds, 2),
        "tracks": tracks,
    }
    names = ["tracks.csv", "tracks.json", "mot.txt"]
    names += ["annotated.mp4"] if options.video else []
    names += [FRAMES] if options.keep_frames else []
    publish(options.output, names, summary)
    return summary


Pair = tuple[Frame, FrameDetections]


class DetectionFeed:
    """Brings frames and detections together: stored ones first, then the detector's.

    Args:
        options: of the run.
        store: the stored detections; None where there are none.
        writer: called before the first frame is detected: opens the store for more.
        detector: called at the same time: builds the detector.

    Attributes:
        stored: frames whose detections were read.
        detected: frames that went through the detector.
        problem: why the detections end before the frames.
    """

    def __init__(
        self,
        options: VideoOptions,
        store: DetectionStore | None,
        writer: Callable[[], DetectionWriter],
        detector: Callable[[], Any],
    ) -> None:
        self._options, self._store = options, store
        self._writer, self._detector = writer, detector
        self.stored, self.detected, self.problem = 0, 0, ""
        self.file: DetectionWriter | None = None

    def alone(self) -> Iterator[Pair]:
        """Yield the stored detections with frames that have no picture."""
        assert self._store is not None
        for found in self._store:
            self.stored += 1
            yield Frame(found.index, found.time, None), found
        self._note_cut()

    def join(self, frames: Iterable[Frame]) -> Iterator[Pair]:
        """Yield each frame with its detections."""
        earlier = iter(self._store) if self._store is not None else iter(())
        batch: list[Frame] = []
        reading, known = True, 0
        for frame in frames:
            found = next(earlier, None) if reading else None
            # Batches hold the frames that they would in an undisturbed run, those included whose
            # detections are known: the last digits of a frame's numbers may depend on its batch.
            batch.append(frame)
            if found is not None:
                self._check(frame, found)
                self.stored += 1
                known = len(batch)
                yield frame, found
            else:
                reading = False
                if self._options.from_detections or (self._store and self._store.end is not None):
                    self._note_cut(frame)
                    return
            if len(batch) == self._options.batch_size:
                yield from self._detect(batch, known)
                batch, known = [], 0
        yield from self._detect(batch, known)

    def _detect(self, batch: list[Frame], known: int) -> Iterator[Pair]:
        """Run the detector on a batch; yield all but the first `known` frames."""
        if known == len(batch):
            return
        if self.file is None:
            self.file = self._writer()
            self._model = self._detector()
        results = self._model(
            [f.index for f in batch], [f.time for f in batch], [f.image for f in batch]
        )
        for frame, found in zip(batch[known:], results[known:], strict=True):
            self.file.write(found)
            self.detected += 1
            yield frame, found

    def _check(self, frame: Frame, found: FrameDetections) -> None:
        if frame.index != found.index or abs(frame.time - found.time) > 1e-3:
            raise ValueError(
                f"{self._options.store}: the stored detections are of another video: frame "
                f"{found.index} at {found.time:.3f} s there, {frame.index} at {frame.time:.3f} s "
                f"in {self._options.input}"
            )

    def _note_cut(self, frame: Frame | None = None) -> None:
        """Say so where the stored detections are cut short."""
        assert self._store is not None
        if self._store.end is None or frame is not None:
            damage = f" ({self._store.damage})" if self._store.damage else ""
            self.problem = f"the stored detections end after {self.stored} frames{damage}"
