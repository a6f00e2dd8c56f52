"""What a run over a video is: its options, and which detections it may reuse."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from pathlib import Path
from typing import Any

from d2kit.config import CfgNode
from d2kit.export.backends import METADATA, is_exported
from d2kit.video.detections import DetectionStore
from d2kit.video.outputs import PRESETS
from d2kit.video.privacy import BLUR_MODES
from d2kit.video.video_file import Selection, SourceInfo

__all__ = ["DETECTIONS", "VideoOptions", "build_header", "stored_detections"]

DETECTIONS = "detections.jsonl.gz"
"""Name of the stored detections in the output folder."""


@dataclasses.dataclass(frozen=True)
class VideoOptions:
    """Options of a run over a video.

    Attributes:
        input: video file, folder of pictures, or camera; may be empty with `from_detections` and
            without `video`.
        output: folder for everything that is written.
        selection: which frames.
        from_detections: never detect: read the stored detections.
        detections: where they are, if not in `output`.
        batch_size: frames that are detected at a time.
        video: write ``annotated.mp4``.
        blur: "people", "bystanders", "faces" or None, see `Anonymizer`.
        subject: identity that stays visible, for "bystanders".
        blur_classes: names of the classes that are people; empty: "person" where there is such a
            class, else all.
        keep_frames: write the frames (blurred, where `blur` says so) to ``frames/``.
        fps: frame rate of a folder of pictures.
        preset: of x264.
        crf: of x264.
        progress: show a progress bar.

    Raises:
        ValueError: for a value that is out of range or does not go with another, by the name of its
            option.
    """

    input: str
    output: Path
    selection: Selection = Selection()
    from_detections: bool = False
    detections: Path | None = None
    batch_size: int = 4
    video: bool = True
    blur: str | None = None
    subject: int | None = None
    blur_classes: tuple[str, ...] = ()
    keep_frames: bool = False
    fps: float = 25.0
    preset: str = "veryfast"
    crf: int = 23
    progress: bool = True

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"--batch-size must be at least 1, got {self.batch_size}")
        if not (math.isfinite(self.fps) and 0 < self.fps <= 1000):
            raise ValueError(f"--fps must be above 0 and at most 1000, got {self.fps}")
        if self.preset not in PRESETS:
            raise ValueError(f"--preset must be one of {', '.join(PRESETS)}; got {self.preset!r}")
        if not 0 <= self.crf <= 51:
            raise ValueError(f"--crf must lie in 0 (exact) ... 51 (worst), got {self.crf}")
        if self.subject is not None and self.subject < 1:
            raise ValueError(f"--subject must be an identity, 1 or above, got {self.subject}")
        if self.subject is not None and self.blur != "bystanders":
            raise ValueError(f"--subject {self.subject} goes with --blur bystanders")
        if self.blur_classes and self.blur is None:
            raise ValueError(f"--blur-class {self.blur_classes[0]} goes with --blur")
        if self.blur is not None and self.blur not in BLUR_MODES:
            raise ValueError(f"--blur must be one of {', '.join(BLUR_MODES)}; got {self.blur!r}")
        if not self.input and (self.draws or not self.from_detections):
            raise ValueError("--input is missing: a video, a folder of pictures, or a camera")

    @property
    def draws(self) -> bool:
        """Whether pictures are needed for what is written."""
        return self.video or self.keep_frames

    @property
    def store(self) -> Path:
        """Path of the stored detections; `detections` may name the file or its folder."""
        place = self.detections or self.output
        return place / DETECTIONS if self.detections is None or place.is_dir() else place

    def people(self, names: list[str]) -> list[int]:
        """Return the classes that are people.

        Raises:
            ValueError: if one of `blur_classes` is not among `names`.
        """
        wanted = self.blur_classes or (("person",) if "person" in names else tuple(names))
        unknown = sorted(set(wanted) - set(names))
        if unknown:
            raise ValueError(f"--blur-class: no class {', '.join(unknown)}; there are {names}")
        return [i for i, name in enumerate(names) if name in wanted]


def build_header(
    cfg: CfgNode, info: SourceInfo, selection: Selection, names: list[str]
) -> dict[str, Any]:
    """Return what says whether stored detections are those of this video and this model.

    Args:
        cfg: the config; of it count MODEL, INPUT and TEST, without the device and the place of the
            weights, and the weights themselves.
        info: the source.
        selection: which frames.
        names: of the classes.
    """
    cfg = cfg.clone()
    cfg.defrost()
    weights = cfg.MODEL.WEIGHTS
    if is_exported(weights):
        weights = os.path.join(weights, METADATA)  # it holds the digests of the other files
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "", ""
    digest = hashlib.sha256()
    for section in (cfg.MODEL, cfg.INPUT, cfg.TEST):
        digest.update(section.dump().encode())
    if os.path.isfile(weights):
        with open(weights, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    else:
        digest.update(weights.encode())
    header = {
        "source": os.path.basename(info.name),
        "bytes": info.bytes,
        "width": info.width,
        "height": info.height,
        "fps": info.fps,
        "selection": dataclasses.asdict(selection),
        "classes": names,
        "model": digest.hexdigest()[:16],
    }
    if info.aspect != 1:
        header["aspect"] = info.aspect
    if info.content:
        header["content"] = info.content
    return header


def stored_detections(options: VideoOptions, header: dict[str, Any]) -> DetectionStore | None:
    """Return the detections of an earlier run of the same command, if there are some.

    Raises:
        ValueError: if there are some of another run.
    """
    path = options.store
    if not path.exists():
        return None
    try:
        store = DetectionStore(path)
    except ValueError:
        if path.stat().st_size > 0 and not _is_cut_gzip(path):
            raise
        path.unlink()  # killed while the first lines were written
        return None
    if info_is_camera(header):
        raise ValueError(
            f"{path}: holds an earlier recording of a camera; choose another --output, or "
            "--from-detections to track it again"
        )
    # The shape of the pixels follows from the source; older files tell neither it nor the digest.
    compared = [k for k in header if k not in ("aspect", "content") or k in store.header]
    different = [k for k in compared if store.header.get(k) != header[k]]
    if different:
        listed = "; ".join(
            f"{k}: {store.header.get(k)!r} there, {header[k]!r} now" for k in different
        )
        raise ValueError(
            f"{path}: these detections are of another run ({listed}). Choose another --output, "
            "delete the file to detect again, or say --from-detections to use them all the same"
        )
    return store


def info_is_camera(header: dict[str, Any]) -> bool:
    """Tell whether a header is that of a camera, whose frames do not come again."""
    return bool(header["bytes"] == 0)


def _is_cut_gzip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"
