"""Predicts files into a folder; a bad file costs nothing but its own result."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from d2kit.data.detection_utils import read_image
from d2kit.evaluation.coco_evaluation import instances_to_coco_json
from d2kit.export.backends import METADATA, is_exported
from d2kit.predict.predictor import ColorOrder, Image, Predictor, check_color, to_array
from d2kit.structures import Instances
from d2kit.utils.file_io import atomic_write, load_json
from d2kit.utils.text import file_name, one_line
from d2kit.visualization import Visualizer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["FileResult", "check_results_file", "predict_files", "write_coco"]


logger = logging.getLogger(__name__)

KEPT = "predictions.jsonl"
MADE_BY = "made by d2kit predict"
_PER_FILE = (OSError, ValueError, RuntimeError, MemoryError)


@dataclasses.dataclass(frozen=True)
class FileResult:
    """What was found in one file.

    Attributes:
        file: its path.
        image_id: its place among all files, from 1.
        size: (height, width), pixels.
        found: detections as COCO annotations, without ids; category ids count from 1.
        error: why there is no result; "" where there is one.
    """

    file: Path
    image_id: int
    size: tuple[int, int] = (0, 0)
    found: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    error: str = ""


def predict_files(
    predictor: Predictor, files: Sequence[Path], output: Path
) -> Iterator[FileResult]:
    """Predict files; draw each into ``overlays/`` and keep its result in ``predictions.jsonl``.

    A run that was stopped goes on behind the results that it has, if predictor, weights and files
    are the same; results of other options are removed first.

    Args:
        predictor: of BGR arrays.
        files: to read, each once.
        output: folder, made where it is missing.

    Yields:
        One result per file, in order; of a file that cannot be read or predicted, its error.

    Raises:
        ValueError: if the model does not find instances.
        OSError: if the results cannot be written.
    """
    if predictor.facts.family and not predictor.facts.finds_instances:
        raise ValueError(
            f"predict is for models that find instances; {predictor.facts.family} gives "
            f"{', '.join(predictor.facts.finds)}"
        )
    overlays = output / "overlays"
    overlays.mkdir(parents=True, exist_ok=True)
    given = {(number, str(file)) for number, file in enumerate(files, start=1)}
    store = _Store(output / KEPT, _digest(predictor), overlays, given)
    with store:
        for start in range(0, len(files), predictor.batch_size):
            batch = list(enumerate(files[start : start + predictor.batch_size], start + 1))
            yield from _predict_batch(predictor, batch, store)


def _predict_batch(
    predictor: Predictor, batch: list[tuple[int, Path]], store: _Store
) -> Iterator[FileResult]:
    results: dict[int, FileResult] = {}
    images: dict[int, np.ndarray] = {}
    for image_id, file in batch:
        known = store.get(image_id, file)
        if known is not None:
            results[image_id] = known
            continue
        try:
            images[image_id] = read_image(file, predictor.color)
        except _PER_FILE as error:
            results[image_id] = FileResult(file, image_id, error=f"{error}")
    detected = _detect(predictor, images)
    for image_id, file in batch:
        if image_id in results:
            yield results[image_id]
            continue
        found = detected[image_id]
        if isinstance(found, str):
            yield FileResult(file, image_id, error=found)
            continue
        image = images[image_id]
        rows = [_annotation(row) for row in instances_to_coco_json(found, image_id)]
        result = FileResult(file, image_id, (image.shape[0], image.shape[1]), rows)
        store.add(result)  # before the picture: a killed run knows of all that it may have drawn
        store.draw(result, image, predictor, found)
        yield result


def _detect(predictor: Predictor, images: dict[int, np.ndarray]) -> dict[int, Instances | str]:
    """Return the detections of each image, or the error of those that fail by themselves."""
    try:
        return dict(zip(images, predictor(list(images.values())), strict=True))
    except _PER_FILE:
        logger.debug("A batch failed: its images are predicted one by one", exc_info=True)
    found: dict[int, Instances | str] = {}
    for image_id, image in images.items():
        try:
            found[image_id] = predictor(image)
        except _PER_FILE as error:
            found[image_id] = f"the model fails: {type(error).__name__}: {error}"
    return found


def _annotation(row: dict[str, Any]) -> dict[str, Any]:
    """Complete a result of COCO's result format to an annotation; category ids count from 1."""
    from pycocotools import mask as mask_util

    area = row["bbox"][2] * row["bbox"][3] if len(row["bbox"]) == 4 else 0.0
    if "segmentation" in row:
        area = int(mask_util.area(row["segmentation"]))
    return {**row, "category_id": row["category_id"] + 1, "area": area, "iscrowd": 0}


def _digest(predictor: Predictor) -> str:
    """Return a digest of all that decides a result, beside the file: config, weights, options."""
    weights = Path(predictor.settings.weights)
    if is_exported(predictor.settings.weights):
        weights /= METADATA  # it holds the digests of the other files
    content = ""
    if weights.is_file():  # its content: another file may have the same time and size
        with weights.open("rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
        content = digest.hexdigest()
    parts = [
        predictor.cfg.dump(),
        content,
        repr((predictor.tile, predictor.tile_overlap, predictor.agnostic_nms, predictor.color)),
    ]
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


def _stamp(file: Path) -> list[int]:
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _is_sound(row: dict[str, Any]) -> bool:
    """Tell whether a line that was read is as `_Store.add` writes it, and names a file of ours."""
    kinds = {"id": int, "file_name": str, "overlay": str, "stamp": list, "annotations": list}
    kinds |= {"height": int, "width": int}
    if not all(isinstance(row.get(key), kind) for key, kind in kinds.items()):
        return False
    classes = [a.get("category_id") if isinstance(a, dict) else None for a in row["annotations"]]
    if not all(type(number) is int and number > 0 for number in classes):
        return False
    if row.get("digest") != _digest_of(row):  # a line that was changed, or is of an earlier version
        return False
    return _is_plain(row["overlay"])


def _is_plain(name: object) -> bool:
    """Tell whether a picture may be deleted where the options differ: it lies nowhere else."""
    return isinstance(name, str) and name == os.path.basename(name) and name.endswith(".jpg")


def _digest_of(row: dict[str, Any]) -> str:
    """Return a digest of a line, which a flipped bit in a score would otherwise not show."""
    content = {key: value for key, value in row.items() if key != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


class _Store:
    """The results so far, one line of JSON each, behind a line with the digest of the options.

    Args:
        path: of the file.
        digest: of the options.
        overlays: folder of the pictures.
        given: (number, path) of the files to predict; results of others are removed.
    """

    def __init__(
        self, path: Path, digest: str, overlays: Path, given: set[tuple[int, str]]
    ) -> None:
        self._path, self._overlays, self._digest = path, overlays, digest
        self._known: dict[tuple[int, str], dict[str, Any]] = {}
        self._warned = False
        lines = self._read()
        if lines and lines[0].get("options") == digest:
            known = {(row["id"], row["file_name"]): row for row in lines[1:]}
            self._known = {key: row for key, row in known.items() if key in given}
            logger.info("%d results of an earlier run are taken over", len(self._known))
        kept = {row["overlay"] for row in self._known.values()}
        for row in lines[1:]:
            if row["overlay"] not in kept:
                (overlays / row["overlay"]).unlink(missing_ok=True)

    def _read(self) -> list[dict[str, Any]]:
        if not self._path.is_file():
            return []
        found: list[dict[str, Any]] = []
        lines = self._path.read_text("utf-8", "replace").splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except ValueError:
                break  # the line that a stopped run did not finish
            if not isinstance(row, dict) or (found and not _is_sound(row)):
                logger.warning("%s: line %d is none of ours: left out", self._path, number)
                name = row.get("overlay") if isinstance(row, dict) else None
                if _is_plain(name):  # of an earlier version, or changed since
                    (self._overlays / str(name)).unlink(missing_ok=True)
                continue
            found.append(row)
        return found

    def __enter__(self) -> _Store:
        # Written anew: the half line of a stopped run must not stand in the middle.
        with atomic_write(self._path, "w") as file:
            rows = [{"options": self._digest}, *self._known.values()]
            file.writelines(f"{json.dumps(row)}\n" for row in rows)
        self._file = self._path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def get(self, image_id: int, file: Path) -> FileResult | None:
        """Return the result that is there already, if file and picture are as they were."""
        row = self._known.get((image_id, str(file)))
        if row is None or not (self._overlays / row["overlay"]).exists():
            return None
        if not file.exists() or row["stamp"] != _stamp(file):
            return None
        return FileResult(file, image_id, (row["height"], row["width"]), row["annotations"])

    def add(self, result: FileResult) -> None:
        """Keep a result, at once."""
        row: dict[str, Any] = {
            "id": result.image_id,
            "file_name": str(result.file),
            "stamp": _stamp(result.file),
            "overlay": _overlay_name(result),
            "height": result.size[0],
            "width": result.size[1],
            "annotations": result.found,
        }
        row["digest"] = _digest_of(row)
        try:
            self._file.write(f"{json.dumps(row)}\n")
            self._file.flush()
        except OSError as error:  # it names no path
            raise OSError(error.errno, error.strerror, str(self._path)) from error

    def draw(
        self, result: FileResult, bgr: np.ndarray, predictor: Predictor, found: Instances
    ) -> None:
        """Write the picture; the results are the product, a picture that fails warns once."""
        try:
            rgb = bgr if predictor.color == "RGB" else bgr[:, :, ::-1]
            drawn = Visualizer(rgb, predictor.metadata).draw_instance_predictions(found)
            drawn.save(os.fspath(self._overlays / _overlay_name(result)))
        except Exception as error:
            if not self._warned:
                logger.warning("%s cannot be drawn: %s", one_line(result.file), one_line(error))
            self._warned = True


def _overlay_name(result: FileResult) -> str:
    return f"{result.image_id:05d}_{file_name(result.file.stem)}.jpg"


def check_results_file(path: Path) -> None:
    """Refuse to replace a file that no run of this tool wrote.

    Raises:
        ValueError: with its path, and what to do.
    """
    if not path.exists() or (path.parent / KEPT).is_file():
        return
    try:
        info = load_json(path).get("info")
    except (ValueError, AttributeError):
        info = None
    if not (isinstance(info, dict) and info.get("description") == MADE_BY):
        raise ValueError(
            f"{path} exists and was not written by this tool: move it away, or choose another "
            "--output"
        )


def write_coco(results: Sequence[FileResult], names: Sequence[str], path: Path) -> None:
    """Write results as a COCO file of images, categories and annotations.

    Args:
        results: those with an error are left out.
        names: of the classes, in the order of their ids.
        path: of the file.
    """
    good = [result for result in results if not result.error]
    images = [
        {"id": r.image_id, "file_name": str(r.file), "height": r.size[0], "width": r.size[1]}
        for r in good
    ]
    annotations = [row for result in good for row in result.found]
    annotations = [{**row, "id": number} for number, row in enumerate(annotations, start=1)]
    categories = [{"id": i, "name": name} for i, name in enumerate(names, start=1)]
    with atomic_write(path, "w") as file:
        info = {"description": MADE_BY}
        json.dump(
            {
                "info": info,
                "images": images,
                "categories": categories,
                "annotations": annotations,
            },
            file,
        )


def show_result(
    img: Image,
    result: Instances,
    class_names: Sequence[str] | None = None,
    score_thr: float = 0.3,
    *,
    color: ColorOrder = "BGR",
    out_file: str | os.PathLike[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw detections over their image with matplotlib, one colour per instance.

    The names of the first four arguments and of `out_file` are MMDetection's.

    Args:
        img: array (H, W, 3) or, grey, (H, W) uint8, a path or a PIL image.
        result: its detections.
        class_names: names in the order of class ids; `Predictor.class_names`.
        score_thr: detections with a lower score are left out.
        color: order of the channels where `img` is an array.
        out_file: picture to write, by suffix; None: none.
        ax: axes to draw into; None: a new figure of the image's shape.

    Returns:
        The axes; ``plt.show()`` shows them, a notebook does so by itself.

    Raises:
        ValueError: if `result` is not of one image, or `color` is neither of the two.
    """
    from d2kit.visualization import Visualizer
    from d2kit.visualization.plots import show_image

    check_color(color)
    if not isinstance(result, Instances):
        raise ValueError(
            f"show_result: expected the detections of one image, got {type(result).__name__}; "
            "call it for each image of a list"
        )
    if isinstance(img, np.ndarray) and img.ndim == 2:
        img = np.repeat(img[:, :, None], 3, axis=2)  # grey
    rgb = to_array(img, color=color, wanted="RGB")
    metadata = {"thing_classes": list(class_names)} if class_names is not None else {}
    kept = result[result.scores >= score_thr]
    drawn = Visualizer(rgb, metadata).draw_instance_predictions(kept)
    if out_file is not None:
        drawn.save(os.fspath(out_file))
    return show_image(drawn.get_image(), ax)
