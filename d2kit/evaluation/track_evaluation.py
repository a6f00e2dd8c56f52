"""Metrics of tracks against ground truth: HOTA, IDF1, MOTA, identity switches."""

from __future__ import annotations

import logging
import math
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from d2kit.utils.file_io import load_json
from d2kit.utils.text import one_line

__all__ = ["METRICS", "evaluate_tracks"]


logger = logging.getLogger(__name__)

PEDESTRIAN = 1  # the class that counts
COLUMNS = ("frame", "id", "left", "top", "width", "height", "score", "class")
WITHOUT_CLASS = 10  # columns of the form whose eighth is no class
MOST_FRAMES = 3_000_000  # 33 hours at 25 frames a second; each is looked at
MOST_BYTES = 2 << 30
LARGEST = 1e7  # pixels


class Row(NamedTuple):
    """A box of a track: frame from 1, identity, left, top, width, height in pixels.

    Args:
        score: 0 in ground truth marks a box that does not count.
        kind: class of MOT16 and later; `PEDESTRIAN` counts.
    """

    frame: int
    identity: int
    x: float
    y: float
    width: float
    height: float
    score: float = 1.0
    kind: int = PEDESTRIAN

    @property
    def counts(self) -> bool:
        """Whether the box is one of the objects, and not one to be left out."""
        return self.score != 0 and self.kind == PEDESTRIAN


def checked_row(values: dict[str, Any], where: str) -> Row:
    """Make a row of numbers or text.

    Args:
        values: column -> value, see `COLUMNS`; ``score`` and ``class`` may be missing.
        where: file and line or id, for the message.

    Raises:
        ValueError: if a value is missing, no number, or out of bounds.
    """
    numbers = {name: _number(value, name, where) for name, value in values.items()}
    for name in ("frame", "id", "class"):
        if not numbers.get(name, 0.0).is_integer():
            raise ValueError(f"{where}: {name} must be a whole number, got {numbers[name]:g}")
    missing = [name for name in COLUMNS[:6] if name not in numbers]
    if missing:
        raise ValueError(f"{where}: has no {', '.join(missing)}")
    frame = int(numbers["frame"])
    if not 1 <= frame <= MOST_FRAMES:
        raise ValueError(f"{where}: frame must be in [1, {MOST_FRAMES:,}], got {frame:,}")
    box = [numbers[name] for name in ("left", "top", "width", "height")]
    if max(map(abs, box)) > LARGEST or min(box[2:]) <= 0:
        raise ValueError(
            f"{where}: width and height must be positive and no number beyond {LARGEST:g} pixels, "
            f"got left, top, width, height {', '.join(f'{x:g}' for x in box)}"
        )
    kind = int(numbers.get("class", PEDESTRIAN))
    return Row(
        frame,
        int(numbers["id"]),
        x=box[0],
        y=box[1],
        width=box[2],
        height=box[3],
        score=numbers.get("score", 1.0),
        kind=PEDESTRIAN if kind == -1 else kind,
    )


def _number(value: object, name: str, where: str) -> float:
    """Return a finite number of at most 2 ** 53, which a float holds exactly."""
    try:
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise TypeError
        if isinstance(value, str) and (len(value) > 100 or not value.isascii() or "_" in value):
            raise ValueError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        shown = one_line(value if isinstance(value, str) else type(value).__name__, 40)
        raise ValueError(f"{where}: {name} must be a number, got '{shown}'") from None
    if not math.isfinite(number) or abs(number) > 1 << 53:
        raise ValueError(f"{where}: {name} must be finite and below 2**53, got {number:g}")
    return number


def read_mot_text(path: Path) -> list[Row]:
    """Read MOT text.

    Args:
        path: lines of 6 or more columns, between commas, semicolons, blanks or tabs.

    Returns:
        All rows, those that do not count too; empty for an empty file.

    Raises:
        ValueError: for a line that is none, naming file, line, column and value; for an identity
            twice in a frame.
    """
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size:,} bytes; expected at most {MOST_BYTES:,}")
    rows: list[Row] = []
    separator: str | None = None
    places: dict[tuple[int, int], int] = {}
    with open(path, encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    if not rows:
                        separator = next((s for s in (",", ";") if s in line), None)
                    rows.append(_row_of_line(line, separator, f"{path}, line {number}"))
                    key = rows[-1][:2]
                    if places.setdefault(key, number) != number:
                        raise ValueError(
                            f"{path}, line {number}: id {key[1]} is twice in frame {key[0]}, also "
                            f"in line {places[key]}"
                        )
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}, behind line {len(rows)}: not UTF-8 text ({error.reason}); expected MOT "
                "text"
            ) from error
    left_out = Counter(row.kind for row in rows if not row.counts)
    if left_out:
        kinds = ", ".join(f"{count:,} of class {kind}" for kind, count in left_out.most_common(5))
        logger.warning(
            "%s: %d of %d lines are no pedestrians (class 1) or are marked to be left out (score "
            "0): %s",
            path,
            left_out.total(),
            len(rows),
            kinds,
        )
    return rows


def _row_of_line(line: str, separator: str | None, where: str) -> Row:
    """Read one line; without a separator its cells are apart by blanks or tabs."""
    text = line.strip().rstrip(",;")
    cells = text.split(separator) if separator else re.split(r"\s+", text)
    cells = [cell.strip() for cell in cells]
    if len(cells) < 6:
        raise ValueError(
            f"{where}: expected at least 6 columns (frame, id, left, top, width, height), got "
            f"{len(cells)}: {one_line(text, 60)}"
        )
    columns = COLUMNS if len(cells) < WITHOUT_CLASS else COLUMNS[:7]
    return checked_row(dict(zip(columns, cells, strict=False)), where)


METRICS = (
    *("HOTA", "DetA", "AssA", "IDF1", "IDP", "IDR", "MOTA", "MOTP"),
    *("IDSW", "Frag", "FP", "FN", "frames"),
)
"""Names in the result; the first eight in percent, the others are counts."""

_RANGE = ("first_frame", "last_frame", "stride")
_FAMILIES = ["HOTA", "CLEAR", "Identity"]


def evaluate_tracks(
    ground_truth: Path,
    results: Path,
    *,
    classes: Sequence[str] = (),
    threshold: float = 0.5,
) -> dict[str, Any]:
    """Compare tracks with ground truth, through the evaluation of the package `trackers`.

    Videos belong together by name; where there is one on either side, whatever its name.

    Args:
        ground_truth: MOT text (``gt.txt``), COCO-video JSON (annotations with ``track_id``, images
            with ``frame_id``, counted from 0, and optionally ``video_id``), or a folder of such.
        results: MOT text, ``tracks.json`` of `track_video`, the folder of such a run, or a folder
            of any of them.
        classes: names of the classes that count, in JSON; empty: all. Classes are not compared.
        threshold: least IoU of a match, for CLEAR and identity metrics; HOTA averages over 19.

    Returns:
        ``{"videos": {name: {metric: value}}, "overall": {metric: value}}``, see `METRICS`.

    Raises:
        FileNotFoundError: if a path does not exist.
        ValueError: if a file is neither, or videos are missing.

    Source: HOTA: Luiten et al. 2021; IDF1: Ristani et al. 2016; MOTA: Bernardin and Stiefelhagen
    2008.
    """
    truth = _load(ground_truth, classes)
    found = _load(results, classes)
    pairs = _paired(truth, found, ground_truth, results)
    per_video = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (left, right) in pairs.items():
            per_video[name] = _evaluate_video(left, right, Path(folder), threshold)
    overall = _overall(per_video)
    return {
        "videos": {name: _row(families) for name, families in per_video.items()},
        "overall": _row(overall),
    }


class _Video:
    """The tracks of one video: where they come from, rows, and which frames were looked at."""

    def __init__(self, path: Path, rows: list[Row], frames: range | None = None) -> None:
        self.path, self.rows, self.frames = path, rows, frames

    def kept(self, frames: range | None) -> list[Row]:
        """Return the rows that count, of some frames only where given."""
        return [r for r in self.rows if r.counts and (frames is None or r.frame - 1 in frames)]

    def write(self, path: Path, frames: range | None, *, truth: bool) -> bool:
        """Write MOT text in one form, whatever was read; return whether a row counts.

        Args:
            path: the file.
            frames: those that count; None: all.
            truth: write what does not count too: what a tracker finds there is no mistake.
        """
        kept = self.kept(frames)
        rows = self.rows if truth else kept
        lines = [
            f"{r.frame},{r.identity},{r.x:.3f},{r.y:.3f},{r.width:.3f},{r.height:.3f},"
            f"{0 if r.score == 0 else 1},{r.kind},1\n"
            for r in rows
            if frames is None or r.frame - 1 in frames
        ]
        path.write_text("".join(lines), encoding="utf-8")
        return bool(kept)


def _load(path: Path, classes: Sequence[str]) -> dict[str, _Video]:
    """Return the videos that a path means, by name."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if not path.is_file() and not path.is_dir():
        raise ValueError(f"{path}: is a pipe or device; expected a file or folder of tracks")
    if path.is_file():
        return _load_file(path, path.stem, classes)
    if (path / "tracks.json").is_file():
        return _load_file(path / "tracks.json", path.name, classes)
    if (path / "gt/gt.txt").is_file():
        return _load_file(path / "gt/gt.txt", path.name, classes)
    videos: dict[str, _Video] = {}
    for entry in sorted(path.iterdir()):
        inner = [entry / "tracks.json", entry / "gt/gt.txt"] if entry.is_dir() else [entry]
        for file in inner:
            if file.is_file() and file.suffix in (".txt", ".json"):
                videos |= _load_file(file, entry.stem if entry.is_file() else entry.name, classes)
    if not videos:
        raise ValueError(
            f"{path}: no tracks in the folder; expected NAME.txt, NAME.json, NAME/gt/gt.txt or "
            "NAME/tracks.json"
        )
    return videos


def _load_file(path: Path, name: str, classes: Sequence[str]) -> dict[str, _Video]:
    if path.suffix != ".json":
        if classes:
            raise ValueError(f"{path}: MOT text has no names of classes; leave --classes out")
        return {name: _Video(path, read_mot_text(path))}
    data = load_json(path)
    if not isinstance(data, dict) or not isinstance(data.get("annotations"), list):
        raise ValueError(
            f"{path}: expected an object with 'annotations', got {type(data).__name__}"
        )
    wanted = _category_ids(data, classes, path)
    try:
        annotations = [
            a
            for a in data["annotations"]
            if not _object(a, "an annotation", path).get("iscrowd")
            and (wanted is None or a.get("category_id") in wanted)
        ]
        if "images" in data:
            return _coco_videos(data, annotations, path, name)
        rows = [_json_row(a["frame"], a, path) for a in annotations]
        video = _object(data["videos"][0], "a video", path)
        frames = None
        if "stride" in video:
            first, last, step = (_whole(video[k], k, path) for k in _RANGE)
            frames = range(first, last + 1, max(step, 1))
        return {Path(video.get("name") or name).stem: _Video(path, rows, frames)}
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{path}: an annotation, image or video lacks {error}") from error


def _category_ids(data: dict[str, Any], classes: Sequence[str], path: Path) -> set[int] | None:
    if not classes:
        return None
    try:
        ids = {str(c["name"]): c["id"] for c in data.get("categories", [])}
        hash(tuple(ids.values()))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: a category is no object with name and id ({error})") from error
    unknown = [name for name in classes if name not in ids]
    if unknown:
        raise ValueError(f"{path}: no class {', '.join(unknown)}; there are {sorted(ids)}")
    return {ids[name] for name in classes}


def _coco_videos(
    data: dict[str, Any], annotations: list[dict[str, Any]], path: Path, name: str
) -> dict[str, _Video]:
    """Split COCO-video JSON into its videos."""
    videos = [_object(v, "a video", path) for v in data.get("videos", [])]
    names = {v["id"]: Path(v.get("name") or v["file_name"]).stem for v in videos}
    entries = [_object(im, "an image", path) for im in data["images"]]
    images = {
        im["id"]: (im.get("video_id"), _whole(im["frame_id"], "frame_id", path)) for im in entries
    }
    rows: dict[Any, list[Row]] = {video: [] for video, _ in images.values()}
    for annotation in annotations:
        video, frame = images[annotation["image_id"]]
        rows[video].append(_json_row(frame, annotation, path))
    return {names.get(video, name): _Video(path, listed) for video, listed in rows.items()}


def _json_row(frame: object, annotation: dict[str, Any], path: Path) -> Row:
    where = f"{path}, annotation {one_line(annotation.get('id', 'without id'), 40)}"
    box = annotation["bbox"]
    if not isinstance(box, list) or len(box) != 4:
        raise ValueError(f"{where}: bbox must be a list of 4 numbers, got {one_line(box, 60)}")
    values = {
        "frame": _whole(frame, "frame", path) + 1,
        "id": annotation["track_id" if "track_id" in annotation else "instance_id"],
        **dict(zip(("left", "top", "width", "height"), box, strict=True)),
    }
    # a score of 0 in JSON is a score, not a mark
    return checked_row(values, where)


def _object(value: object, what: str, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {what} must be an object, got {one_line(value, 60)}")
    return value


def _whole(value: object, name: str, path: Path) -> int:
    if type(value) is not int or not 0 <= value < MOST_FRAMES:
        raise ValueError(
            f"{path}: {name} must be a whole number in [0, {MOST_FRAMES:,}), got "
            f"{one_line(value, 40)}"
        )
    return value


def _paired(
    truth: dict[str, _Video], found: dict[str, _Video], left: Path, right: Path
) -> dict[str, tuple[_Video, _Video]]:
    if len(truth) == len(found) == 1:
        name = next(iter(truth))
        return {name: (truth[name], next(iter(found.values())))}
    missing = [name for name in truth if name not in found]
    if missing:
        raise ValueError(
            f"{right}: no tracks of {', '.join(missing[:5])}, which {left} has; there are "
            f"{', '.join(sorted(found)[:5])}"
        )
    return {name: (truth[name], found[name]) for name in sorted(truth)}


def _evaluate_video(truth: _Video, found: _Video, folder: Path, threshold: float) -> dict[str, Any]:
    """Return the three families of metrics of one video."""
    from trackers.eval import evaluate_mot_sequence

    left, right = folder / "truth.txt", folder / "found.txt"
    if not truth.write(left, found.frames, truth=True):
        raise ValueError(f"{truth.path}: no ground truth in the frames that were tracked")
    if not found.write(right, None, truth=False):
        return _nothing_found(truth.kept(found.frames), threshold)
    result = evaluate_mot_sequence(left, right, metrics=_FAMILIES, threshold=threshold)
    return {
        "HOTA": result.HOTA.to_dict(include_arrays=True, arrays_as_list=False),  # type: ignore[union-attr]
        "CLEAR": result.CLEAR.to_dict(),  # type: ignore[union-attr]
        "Identity": result.Identity.to_dict(),  # type: ignore[union-attr]
    }


def _nothing_found(rows: list[Row], threshold: float) -> dict[str, Any]:
    """Return the metrics of a video in which nothing was tracked; the package refuses its file."""
    from trackers.eval import (
        compute_clear_metrics,
        compute_hota_metrics,
        compute_identity_metrics,
    )

    numbers = {identity: k for k, identity in enumerate(sorted({row.identity for row in rows}))}
    by_frame: dict[int, list[int]] = defaultdict(list)
    for row in rows:
        by_frame[row.frame].append(numbers[row.identity])
    frames = range(1, max(by_frame) + 1)
    ids = [np.array(by_frame.get(f, []), np.intp) for f in frames]
    none = [np.zeros(0, np.intp) for _ in frames]
    overlap = [np.zeros((len(here), 0)) for here in ids]
    return {
        "HOTA": compute_hota_metrics(ids, none, overlap),
        "CLEAR": compute_clear_metrics(ids, none, overlap, threshold=threshold),
        "Identity": compute_identity_metrics(ids, none, overlap, threshold=threshold),
    }


def _overall(videos: dict[str, dict[str, Any]]) -> dict[str, Any]:
    from trackers.eval import (
        aggregate_clear_metrics,
        aggregate_hota_metrics,
        aggregate_identity_metrics,
    )

    return {
        "HOTA": aggregate_hota_metrics([v["HOTA"] for v in videos.values()]),
        "CLEAR": aggregate_clear_metrics([v["CLEAR"] for v in videos.values()]),
        "Identity": aggregate_identity_metrics([v["Identity"] for v in videos.values()]),
    }


def _row(families: dict[str, Any]) -> dict[str, Any]:
    """Return the metrics of `METRICS`."""
    values = {**families["HOTA"], **families["CLEAR"], **families["Identity"]}
    values |= {name: values[f"CLR_{name}"] for name in ("FP", "FN")}
    values["frames"] = values["CLR_Frames"]
    percent = {name: round(100 * float(values[name]), 3) for name in METRICS[:8]}
    return {**percent, **{name: int(values[name]) for name in METRICS[8:]}}
