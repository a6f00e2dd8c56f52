r"""Detections on disk: append-only, compact, readable while they grow, sound after a crash.

The file is ``gzip`` of JSON lines, written as one gzip member after another: a member holds some
frames and ends with a checksum. What was being written when the process died is the last member;
it is cut off. ``zcat`` shows the file. The first line describes the run, the last one says how it
ended: a file without it was cut short and can be continued.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from d2kit.config import CfgNode
from d2kit.predict import Predictor
from d2kit.predict.predictor import check_loaded
from d2kit.structures import Boxes, Instances
from d2kit.structures.masks import rle_problem
from d2kit.utils.text import one_line

FORMAT = "d2kit detections 1"
_BLOCK = 2**16
_MEMBER_LIMIT = 2**28  # bytes of text of one member: no file of ours comes near
_FRAMES, _SECONDS = 64, 5.0  # a member is closed after so many frames or so long


def _is_number(value: Any, low: float, high: float) -> bool:
    return type(value) in (int, float) and low < value <= high


_MOST = 1e12
_SIDE = ("whole pixels from 1 to 65,535", lambda v: type(v) is int and 0 < v < 1 << 16)
_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "height": _SIDE,
    "width": _SIDE,
    "fps": ("frames per second, > 0 and at most 100,000", lambda v: _is_number(v, 0, 1e5)),
    "aspect": (
        "width by height of a pixel, > 0, <= 1,000",
        lambda v: _is_number(v, 0, 1e3),
    ),
    "bytes": ("bytes of the source", lambda v: type(v) is int and 0 <= v < 1 << 63),
    "source": ("the name of a file", lambda v: isinstance(v, str) and len(v) < 5000),
    "content": ("a digest of the source", lambda v: isinstance(v, str) and len(v) < 200),
    "model": ("text", lambda v: isinstance(v, str)),
    "classes": (
        "a list of names",
        lambda v: isinstance(v, list) and len(v) < 1e5 and all(isinstance(n, str) for n in v),
    ),
    "selection": (
        "stride, start and end in seconds",
        lambda v: (
            isinstance(v, dict)
            and v.get("start", 0) is not None
            and set(v) <= {"stride", "start", "end"}
            and all(n is None or _is_number(n, -1, _MOST) for n in v.values())
            and type(v.get("stride", 1)) is int
            and v.get("stride", 1) > 0
        ),
    ),
}
"""Field of the header -> what it is, and whether a value is that."""


class DetectionWriter:
    """Appends frames to a store.

    Args:
        path: the file; must not exist, unless `append`.
        header: describes the run; JSON. Ignored where the file is continued.
        append: continue the file, from the end of its last sound member.
        frames: number of frames after which they are written and synced to the disk.
        seconds: time after which they are, should there be fewer.
    """

    def __init__(
        self,
        path: Path,
        header: dict[str, Any],
        *,
        append: DetectionStore | None = None,
        frames: int = _FRAMES,
        seconds: float = _SECONDS,
    ) -> None:
        self._limits = (frames, seconds)
        self._lines: list[str] = []
        self._since = time.monotonic()
        self._file: IO[bytes]
        if append is None:
            self._file = path.open("xb")
            self._lines.append(json.dumps({"format": FORMAT, **header}))
            self._write()
        else:
            self._file = path.open("r+b")
            self._file.truncate(append.sound_bytes)
            self._file.seek(append.sound_bytes)

    def write(self, found: FrameDetections) -> None:
        """Append one frame."""
        record: dict[str, Any] = {
            "frame": found.index,
            "time": found.time,
            "boxes": [[round(v, 2) for v in box] for box in found.boxes.tolist()],
            "scores": [round(v, 4) for v in found.scores.tolist()],
            "classes": found.classes.tolist(),
        }
        if found.masks is not None:
            record["masks"] = found.masks
        self._lines.append(json.dumps(record, separators=(",", ":")))
        frames, seconds = self._limits
        if len(self._lines) >= frames or time.monotonic() - self._since > seconds:
            self._write()

    def close(self, end: dict[str, Any] | None = None) -> None:
        """Write what is left and close the file.

        Args:
            end: how the run ended, where it did; None leaves the file open to be continued.
        """
        if self._file.closed:
            return
        if end is not None:
            self._lines.append(json.dumps({"end": end}))
        self._write()
        self._file.close()

    def _write(self) -> None:
        if self._lines:
            text = "\n".join(self._lines) + "\n"
            self._file.write(gzip.compress(text.encode(), compresslevel=6, mtime=0))
            self._file.flush()
            os.fsync(self._file.fileno())
        self._lines = []
        self._since = time.monotonic()


class DetectionStore:
    """Reads a store, one member at a time.

    Args:
        path: the file.

    Attributes:
        header: what describes the run.
        end: how it ended; None until it was read to the end, and where it was cut short.
        sound_bytes: length of the sound members read so far.
        damage: what is wrong after them, empty where nothing is.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is no such file.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(
                f"{self.path}: no stored detections there; run once without --from-detections"
            )
        self.sound_bytes, self.damage = 0, ""
        self.end: dict[str, Any] | None = None
        first = next(self._lines(), None)
        if not isinstance(first, dict) or first.get("format") != FORMAT:
            raise ValueError(
                f"{self.path}: not a file of detections ('{FORMAT}'), or cut off in its first "
                f"lines{': ' + self.damage if self.damage else ''}"
            )
        self.header = first
        self._check_header()
        self.size: tuple[int, int] = first["height"], first["width"]

    def _check_header(self) -> None:
        """Raise ValueError for a field that is none; those of later versions may be missing."""
        for key, (wanted, fits) in _FIELDS.items():
            value = self.header.get(key)
            if (key in self.header or key in ("height", "width")) and not fits(value):
                raise ValueError(
                    f"{self.path}: header: {key}: expected {wanted}, got "
                    f"{one_line(repr(value), 60)}"
                )

    def __iter__(self) -> Iterator[FrameDetections]:
        """Yield the frames, from the first.

        Raises:
            ValueError: for a record that is damaged although its checksum is right.
        """
        self.sound_bytes, self.damage, self.end = 0, "", None
        lines = self._lines()
        next(lines)
        for line in lines:
            if not isinstance(line, dict):
                raise ValueError(f"{self.path}: expected frames, got {one_line(line, 60)}")
            if "end" in line:
                self.end = line["end"] if isinstance(line["end"], dict) else {}
                return
            yield self._record(line)

    def _record(self, line: dict[str, Any]) -> FrameDetections:
        try:
            found = FrameDetections(
                int(line["frame"]),
                float(line["time"]),
                np.array(line["boxes"], np.float64),
                np.array(line["scores"], np.float64),
                np.array(line["classes"], np.int64),
                line.get("masks"),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            frame = one_line(repr(line.get("frame")), 40)
            raise ValueError(f"{self.path}: frame {frame}: {error}") from error
        for counts in found.masks or ():
            rle = {"size": list(self.size), "counts": counts}
            problem = rle_problem(rle, *self.size)
            if problem:
                raise ValueError(f"{self.path}: frame {found.index}: {problem}")
        return found

    def _lines(self) -> Iterator[dict[str, Any]]:
        """Yield the lines of one sound member after another."""
        rest = b""
        with open(self.path, "rb") as file:
            while True:
                rest = rest or file.read(_BLOCK)
                if not rest:
                    return
                member, text = zlib.decompressobj(wbits=31), b""
                try:
                    used = 0
                    while not member.eof:
                        text += member.decompress(rest)
                        used += len(rest) - len(member.unused_data)
                        if len(text) > _MEMBER_LIMIT:
                            raise zlib.error(f"a member of more than {_MEMBER_LIMIT} bytes")
                        if member.eof:
                            break
                        rest = file.read(_BLOCK)
                        if not rest:
                            raise zlib.error("the last frames are incomplete")
                    lines = [json.loads(line) for line in text.splitlines()]
                except (zlib.error, ValueError, RecursionError) as error:
                    self.damage = f"after {self.sound_bytes} bytes: {error}"
                    return
                rest = member.unused_data
                self.sound_bytes += used
                yield from lines


@dataclasses.dataclass(frozen=True)
class FrameDetections:
    """What was found in one frame.

    Numbers are rounded when it is made, so that a run that reads them from a file sees what the
    run that wrote them saw.

    Attributes:
        index: number of the frame in its video, from 0.
        time: its time stamp, seconds.
        boxes: (R, 4) float32 XYXY, pixels, rounded to 0.01.
        scores: (R,) float32 in [0, 1], rounded to 0.0001.
        classes: (R,) int64 contiguous classes.
        masks: R compressed run-length masks (``counts`` of COCO) of the frame's size, or None.
    """

    index: int
    time: float
    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    masks: list[str] | None = None

    def __post_init__(self) -> None:
        boxes = np.asarray(self.boxes, np.float64).reshape(-1, 4).round(2).astype(np.float32)
        scores = np.asarray(self.scores, np.float64).reshape(-1).round(4).astype(np.float32)
        classes = np.asarray(self.classes, np.int64).reshape(-1)
        sizes = {len(boxes), len(scores), len(classes)}
        sizes |= {len(self.masks)} if self.masks is not None else set()
        if len(sizes) != 1 or not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
            raise ValueError(
                f"detections of frame {self.index}: expected as many finite boxes, scores, classes "
                f"and masks, got {len(boxes)}, {len(scores)}, {len(classes)} and "
                f"{'none' if self.masks is None else len(self.masks)}"
            )
        object.__setattr__(self, "boxes", boxes)
        object.__setattr__(self, "scores", scores)
        object.__setattr__(self, "classes", classes)
        object.__setattr__(self, "time", round(float(self.time), 6))

    def __len__(self) -> int:
        return len(self.scores)

    def chosen(self, least_score: float) -> FrameDetections:
        """Return those with at least a score, in an order that is their own: best first."""
        keys = [*self.boxes.T[::-1], self.classes, -self.scores]
        order = np.lexsort(keys)
        order = order[self.scores[order] >= np.float32(least_score)]
        masks = None if self.masks is None else [self.masks[i] for i in order]
        return FrameDetections(
            self.index, self.time, self.boxes[order], self.scores[order], self.classes[order], masks
        )

    def instances(self, size: tuple[int, int]) -> Instances:
        """Return them as `Instances` of an image of `size` (height, width)."""
        fields: dict[str, Any] = {
            "pred_boxes": Boxes(torch.from_numpy(self.boxes)),
            "scores": torch.from_numpy(self.scores),
            "pred_classes": torch.from_numpy(self.classes),
        }
        if self.masks is not None:
            fields["pred_masks"] = [{"size": list(size), "counts": c} for c in self.masks]
        return Instances(size, **fields)


class BatchDetector:
    """Runs a model on some frames at a time.

    Args:
        predictor: takes frames in BGR.
    """

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor

    def __call__(
        self, indices: Sequence[int], times: Sequence[float], images: Sequence[np.ndarray]
    ) -> list[FrameDetections]:
        """Detect in a batch.

        Args:
            indices: N numbers of frames.
            times: N time stamps, seconds.
            images: N frames (H, W, 3) uint8 BGR.

        Returns:
            N results.

        Raises:
            ValueError: if the model does not find instances.
        """
        outputs = self._predictor.outputs(images)
        return [_record(*row) for row in zip(indices, times, outputs, strict=True)]


def _record(index: int, time: float, output: dict[str, Any]) -> FrameDetections:
    from d2kit.evaluation.coco_evaluation import instances_to_coco_json

    if "instances" not in output:
        raise ValueError(
            f"the model does not find instances, but {sorted(output)}: tracking needs a detector"
        )
    found = output["instances"].to("cpu")
    masks = None
    if found.has("pred_masks"):
        masks = [row["segmentation"]["counts"] for row in instances_to_coco_json(found, 0)]
    boxes = found.pred_boxes.tensor.numpy()
    return FrameDetections(
        index, time, boxes, found.scores.numpy(), found.pred_classes.numpy(), masks
    )


def build_detector(cfg: CfgNode) -> tuple[BatchDetector, list[str]]:
    """Build the detector of a config.

    Args:
        cfg: the config; ``MODEL.WEIGHTS`` is loaded.

    Returns:
        The detector and the names of its classes.
    """
    predictor = Predictor(cfg)
    check_loaded(predictor.model, cfg.MODEL.WEIGHTS)
    return BatchDetector(predictor), predictor.class_names
