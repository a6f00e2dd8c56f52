"""Cityscapes: reading its instances and label images.

Source: Cordts et al., "The Cityscapes Dataset for Semantic Urban Scene Understanding", 2016 (arXiv
1604.01685); the layout is that of the published archives.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from d2kit.data.catalog import CITYSCAPES_CATEGORIES
from d2kit.data.datasets.validate import Problems, all_numbers, read_json, short
from d2kit.data.detection_utils import read_label_map
from d2kit.structures import BoxMode
from d2kit.utils.file_io import PathManager

__all__ = ["ground_truth_file", "load_cityscapes_instances", "load_cityscapes_semantic"]

logger = logging.getLogger(__name__)

Record = dict[str, Any]

_IMAGE_SUFFIX = "_leftImg8bit.png"
_THINGS = [category for category in CITYSCAPES_CATEGORIES if category["isthing"]]
_INDEX_OF_NAME = {category["name"]: index for index, category in enumerate(_THINGS)}
_INDEX_OF_LABEL = {category["id"]: index for index, category in enumerate(_THINGS)}
_FIRST_INSTANCE = 1000
_SEE_THROUGH = ("license plate",)
"""Labels that do not hide what is below them: they have no label id."""


def load_cityscapes_instances(
    image_dir: str, gt_dir: str, from_json: bool = True, to_polygons: bool = True
) -> list[Record]:
    """Load the instances of a split.

    Args:
        image_dir: for example "cityscapes/leftImg8bit/train", with a folder per city.
        gt_dir: for example "cityscapes/gtFine/train".
        from_json: read ``*_polygons.json``; False: ``*_instanceIds.png``.
        to_polygons: masks as polygons; those that are hidden in part are traced on the pixels, to a
            quarter of a pixel. False: as run-length masks.

    Returns:
        One record per image: `file_name`, `image_id` (name of the file), `height`, `width`, and
        `annotations` of the visible parts: `bbox` (XYXY_ABS), `bbox_mode`, `category_id` (0 to 7),
        `segmentation`, `iscrowd` (1: a group).

    Raises:
        FileNotFoundError: a folder or a ground-truth file does not exist.
        DatasetError: a damaged file, with its path, object and field.
    """
    suffix = "polygons.json" if from_json else "instanceIds.png"
    read = _instances_of_json if from_json else _instances_of_png
    return _load(image_dir, gt_dir, suffix, partial(read, to_polygons=to_polygons))


def load_cityscapes_semantic(image_dir: str, gt_dir: str) -> list[Record]:
    """Load the label images of a split.

    Args:
        image_dir: for example "cityscapes/leftImg8bit/train", with a folder per city.
        gt_dir: for example "cityscapes/gtFine/train"; its ``*_labelTrainIds.png`` are made by
            ``python -m cityscapesscripts.preparation.createTrainIdLabelImgs``.

    Returns:
        One record per image: `file_name`, `sem_seg_file_name`, `height`, `width`.

    Raises:
        FileNotFoundError: a folder or a label image does not exist.
    """
    return _load(image_dir, gt_dir, "labelTrainIds.png", _semantic)


def ground_truth_file(file_name: str, image_dir: str, gt_dir: str, suffix: str) -> str:
    """Return the ground-truth file of an image.

    Args:
        file_name: below `image_dir`, ``<city>/<name>_leftImg8bit.png``.
        image_dir: folder of the split's images.
        gt_dir: folder of its ground truth, "gtFine/..." or "gtCoarse/...".
        suffix: for example "instanceIds.png".

    Raises:
        ValueError: the image is not below `image_dir`, or has another ending.
    """
    relative = os.path.relpath(file_name, image_dir)
    if relative.split(os.sep)[0] == os.pardir or not relative.endswith(_IMAGE_SUFFIX):
        raise ValueError(f"'{file_name}' is no '*{_IMAGE_SUFFIX}' below '{image_dir}'")
    kind = "gtCoarse" if "gtCoarse" in os.path.normpath(gt_dir).split(os.sep) else "gtFine"
    return os.path.join(gt_dir, f"{relative.removesuffix(_IMAGE_SUFFIX)}_{kind}_{suffix}")


def _load(
    image_dir: str, gt_dir: str, suffix: str, read: Callable[[str, str], Record]
) -> list[Record]:
    """Read the ground truth of all images, several at a time, in the order of their names."""
    image_dir, gt_dir = (PathManager.get_local_path(folder) for folder in (image_dir, gt_dir))
    if not os.path.isdir(image_dir):
        raise FileNotFoundError(
            f"folder '{image_dir}' does not exist; expected is the layout of the Cityscapes "
            "archives (see datasets/README.md)"
        )
    files = sorted(
        os.path.join(city.path, name)
        for city in os.scandir(image_dir)
        if city.is_dir()
        for name in os.listdir(city.path)
        if name.endswith(_IMAGE_SUFFIX)
    )
    truths = [ground_truth_file(file, image_dir, gt_dir, suffix) for file in files]
    missing = [truth for truth in truths if not os.path.isfile(truth)]
    if missing or not files:
        what = f"'{missing[0]}'" if missing else f"any '*{_IMAGE_SUFFIX}' in '{image_dir}'"
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        hint = (
            "; run python -m cityscapesscripts.preparation.createTrainIdLabelImgs to make it"
            if "TrainIds" in suffix
            else "; see datasets/README.md"
        )
        raise FileNotFoundError(f"{what} does not exist{more}{hint}")
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        records = list(pool.map(read, files, truths))
    logger.info("Loaded %d images from %s", len(records), image_dir)
    return records


def _semantic(file: str, truth: str) -> Record:
    from PIL import Image

    with Image.open(truth, formats=["PNG"]) as image:  # reads the header alone
        width, height = image.size
    return {"file_name": file, "sem_seg_file_name": truth, "height": height, "width": width}


def _record(file: str, size: tuple[int, int], annotations: list[Record]) -> Record:
    return {
        "file_name": file,
        "image_id": os.path.basename(file),
        "height": size[0],
        "width": size[1],
        "annotations": annotations,
    }


def _instances_of_png(file: str, truth: str, *, to_polygons: bool) -> Record:
    """Read ``*_instanceIds.png``: label id * 1000 + number, or the label id alone for a group."""
    values = read_label_map(truth)
    annotations = []
    for value in np.unique(values):
        label = value if value < _FIRST_INSTANCE else value // _FIRST_INSTANCE
        index = _INDEX_OF_LABEL.get(int(label))
        if index is None:
            continue
        ys, xs = np.nonzero(values == value)
        box = (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)
        crop = values[box[1] : box[3], box[0] : box[2]] == value
        annotation = _annotation(crop, box, values.shape, to_polygons)
        crowd = int(value < _FIRST_INSTANCE)
        annotations.append({**annotation, "category_id": index, "iscrowd": crowd})
    return _record(file, values.shape[:2], annotations)


def _instances_of_json(file: str, truth: str, *, to_polygons: bool) -> Record:
    """Read ``*_polygons.json``: objects from the farthest to the nearest, which hides others."""
    import cv2

    size, objects = _read_polygons(truth)
    canvas = np.zeros(size, dtype=np.int32)
    shapes = [np.round(points).astype(np.int32) for _, points in objects]
    for number, shape in enumerate(shapes, start=1):
        cv2.fillPoly(canvas, [shape], number)
    annotations = []
    for number, ((label, points), shape) in enumerate(zip(objects, shapes, strict=True), start=1):
        index = _INDEX_OF_NAME.get(label.removesuffix("group"))
        if index is None:
            continue
        x0, y0 = shape.min(axis=0).clip(0)
        x1, y1 = (shape.max(axis=0) + 1).clip(0)
        part = canvas[y0:y1, x0:x1] == number
        if not part.any():
            continue  # hidden wholly
        ys, xs = np.flatnonzero(part.any(axis=1)), np.flatnonzero(part.any(axis=0))
        crop = part[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1]
        box = tuple(int(v) for v in (x0 + xs[0], y0 + ys[0], x0 + xs[-1] + 1, y0 + ys[-1] + 1))
        annotation = _annotation(crop, box, size, to_polygons)
        if to_polygons and _is_whole(part, shape - [x0, y0]):
            annotation["segmentation"] = [points.reshape(-1).tolist()]
        crowd = int(label.endswith("group"))
        annotations.append({**annotation, "category_id": index, "iscrowd": crowd})
    return _record(file, size, annotations)


def _is_whole(visible: np.ndarray, shape: np.ndarray) -> bool:
    """Whether all of a polygon, in the coordinates of the crop, can be seen."""
    import cv2

    alone = np.zeros(visible.shape, dtype=np.uint8)
    cv2.fillPoly(alone, [shape], 1)
    return bool((alone == visible).all())


def _read_polygons(path: str) -> tuple[tuple[int, int], list[tuple[str, np.ndarray]]]:
    """Return (h, w) and the labels and outlines (n, 2) of the objects that hide others."""
    problems = Problems(path)
    data = read_json(path, path)
    size = data.get("imgHeight"), data.get("imgWidth")
    if not all(type(side) is int and 0 < side < 2**15 for side in size):
        problems.add("top level", "imgHeight, imgWidth", f"expected pixels, got {short(size)}")
    objects = data.get("objects")
    if not isinstance(objects, list):
        problems.add("top level", "objects", f"expected a list, got {short(objects)}")
        objects = []
    found = []
    for number, entry in enumerate(objects):
        where = f"object number {number}"
        if not isinstance(entry, dict) or not isinstance(entry.get("label"), str):
            problems.add(where, "label", f"expected an object with a label, got {short(entry)}")
            continue
        polygon = entry.get("polygon")
        points = polygon if isinstance(polygon, list) else []
        sound = all(all_numbers(point) and len(point) == 2 for point in points)
        if not points or not sound:
            problems.add(where, "polygon", f"expected [[x, y], ...], got {short(polygon)}")
        elif "deleted" not in entry and entry["label"] not in _SEE_THROUGH:
            found.append((entry["label"], np.array(points, dtype=np.float64).clip(-1e4, 1e5)))
    problems.raise_if_any()
    return (size[0], size[1]), found  # type: ignore[return-value]


def _annotation(
    crop: np.ndarray, box: tuple[int, ...], size: tuple[int, ...], to_polygons: bool
) -> Record:
    """Return box and segmentation of a mask.

    Args:
        crop: (h, w) bool, the mask within its box.
        box: XYXY in pixels.
        size: (H, W) of the image.
        to_polygons: polygons in place of a run-length mask.
    """
    if to_polygons:
        masks: Any = _outlines(crop, box[0], box[1])
    else:
        from pycocotools import mask as mask_util

        full = np.zeros(size[:2], dtype=np.uint8, order="F")
        full[box[1] : box[3], box[0] : box[2]] = crop
        masks = mask_util.encode(full)
    return {
        "bbox": [float(side) for side in box],
        "bbox_mode": BoxMode.XYXY_ABS,
        "segmentation": masks,
    }


def _outlines(crop: np.ndarray, left: int, top: int) -> list[list[float]]:
    """Trace the outer outlines of a mask, a quarter of a pixel inside of it."""
    import cv2

    doubled = crop.astype(np.uint8).repeat(2, axis=0).repeat(2, axis=1)
    contours, _ = cv2.findContours(doubled, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return [
        ((contour[:, 0, :] + 0.5) / 2 + [left, top]).reshape(-1).tolist()
        for contour in contours
        if len(contour) >= 3
    ]
