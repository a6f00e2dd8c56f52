"""What the formats share: building COCO dictionaries, names of files, shapes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from d2kit.curate.findings import true_area
from d2kit.data.datasets.validate import DatasetError, Problems, check_coco, path_problem, read_json
from d2kit.utils.file_io import atomic_write
from d2kit.utils.image_files import IMAGE_SUFFIXES

Polygons = list[list[float]]

ELLIPSE_POINTS = 128

DIGITS = 4
"""Decimals of a pixel that are kept where sums and shares leave a rounding behind them."""


class CocoBuilder:
    """Collects images, classes and annotations with ids from 1.

    Args:
        source: path for messages.
        names: classes in their order; where None, they are those found, sorted.
        lost: counts what COCO cannot hold.
    """

    def __init__(
        self,
        source: Path,
        names: Sequence[str] | None = None,
        lost: Counter[str] | None = None,
    ) -> None:
        self.problems = Problems(str(source))
        self.lost: Counter[str] = Counter() if lost is None else lost
        self.images: list[dict[str, Any]] = []
        self.found: list[tuple[str, dict[str, Any]]] = []
        self.names = None if names is None else list(names)

    def image(self, file_name: str, width: int, height: int) -> int:
        """Add an image; return its id."""
        name = file_name.replace("\\", "/")
        number = len(self.images) + 1
        what = path_problem(name, ".")
        if what or width <= 0 or height <= 0:
            self.problems.add(f"image '{name:.200}'", "file_name" if what else "size", what or "0")
        self.images.append({"id": number, "file_name": name, "width": width, "height": height})
        return number

    def add(self, image_id: int, name: str, shape: Any, **extra: Any) -> None:
        """Add an annotation.

        Args:
            image_id: from `image`.
            name: class.
            shape: [x, y, width, height], polygons, or an uncompressed or compressed mask.
            extra: further fields.
        """
        entry: dict[str, Any] = {"image_id": image_id, "iscrowd": 0}
        if isinstance(shape, dict):
            entry |= {"segmentation": shape, "bbox": mask_box(shape)}
        elif shape and isinstance(shape[0], list):
            entry |= {"segmentation": shape, "bbox": polygon_box(shape)}
        else:
            entry["bbox"] = [round(float(v), DIGITS) for v in shape]
        entry |= extra
        self.found.append((name, entry))

    def finish(self) -> dict[str, Any]:
        """Return the COCO dictionary.

        Raises:
            DatasetError: one line for each problem.
        """
        self.problems.raise_if_any()
        names = self.names or []
        names = names + sorted({name for name, _ in self.found} - set(names))
        sizes = {image["id"]: (image["height"], image["width"]) for image in self.images}
        annotations = []
        for number, (name, entry) in enumerate(self.found, start=1):
            area = round(true_area(entry, *sizes[entry["image_id"]]), 2)
            category = names.index(name) + 1
            annotations.append({"id": number, "category_id": category, "area": area, **entry})
        categories = [{"id": i, "name": name} for i, name in enumerate(names, start=1)]
        return {"images": self.images, "annotations": annotations, "categories": categories}


def polygon_box(polygons: Polygons) -> list[float]:
    """Return [x, y, width, height] around polygons."""
    xs = [x for polygon in polygons for x in polygon[::2]]
    ys = [y for polygon in polygons for y in polygon[1::2]]
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def turn(points: np.ndarray, degrees: float) -> np.ndarray:
    """Turn (P, 2) points around their mean, clockwise as seen in the image."""
    angle = np.radians(degrees)
    matrix = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    middle = points.mean(0)
    return (points - middle) @ matrix + middle


def turned_ellipse(x: float, y: float, rx: float, ry: float, degrees: float = 0.0) -> list[float]:
    """Return x, y, x, y, ... of a polygon along an ellipse.

    Args:
        x: of the middle.
        y: of the middle.
        rx: half axis along x before the ellipse is turned.
        ry: half axis along y.
        degrees: clockwise.
    """
    angles = np.arange(ELLIPSE_POINTS) * (2 * np.pi / ELLIPSE_POINTS)
    points = np.stack([x + rx * np.cos(angles), y + ry * np.sin(angles)], 1)
    return turn(points, degrees).ravel().tolist()


def mask_box(rle: Mapping[str, Any]) -> list[float]:
    """Return [x, y, width, height] around a compressed mask."""
    from pycocotools import mask as mask_util

    return [float(v) for v in mask_util.toBbox(rle)]


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Return the compressed run lengths of a (H, W) mask."""
    from pycocotools import mask as mask_util

    rle = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def decode_mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Return the (H, W) bool mask of polygons or run lengths."""
    from pycocotools import mask as mask_util

    if isinstance(segmentation, dict):
        plain = isinstance(segmentation["counts"], list)
        rle = mask_util.frPyObjects(segmentation, height, width) if plain else segmentation
    else:
        rle = mask_util.merge(mask_util.frPyObjects(segmentation, height, width))
    return mask_util.decode(rle).astype(bool)


def annotations_by_image(
    coco: Mapping[str, Any], lost: Counter[str]
) -> dict[int, list[dict[str, Any]]]:
    """Return the annotations of each image, of images without any too.

    Args:
        coco: COCO dictionary.
        lost: counts what no format but COCO holds here: keypoints, and masks without a pixel.

    Raises:
        ValueError: a box is rotated.
    """
    sizes = {image["id"]: (image["height"], image["width"]) for image in coco["images"]}
    table: dict[int, list[dict[str, Any]]] = {number: [] for number in sizes}
    for a in coco["annotations"]:
        if len(a["bbox"]) != 4:
            raise ValueError(
                f"annotation {a['id']}: bbox: expected [x, y, width, height], got {a['bbox']}; "
                "only COCO JSON holds rotated boxes"
            )
        lost["keypoints (objects that have some)"] += bool(a.get("keypoints"))
        if isinstance(a.get("segmentation"), dict) and not true_area(a, *sizes[a["image_id"]]):
            lost["masks without a pixel"] += 1
            continue
        table[a["image_id"]].append(a)
    return table


def class_names(coco: Mapping[str, Any]) -> dict[int, str]:
    """Return category id -> name, in the order of the ids."""
    return {c["id"]: c["name"] for c in sorted(coco["categories"], key=lambda c: c["id"])}


def side_files(coco: Mapping[str, Any], folder: Path, suffix: str) -> dict[int, Path]:
    """Return image id -> path below `folder`, named as the image, with another ending.

    Raises:
        ValueError: two images would share a file.
    """
    paths: dict[int, Path] = {}
    owner: dict[Path, str] = {}
    for image in coco["images"]:
        path = folder / PurePosixPath(image["file_name"]).with_suffix(suffix)
        other = owner.setdefault(path, image["file_name"])
        if other != image["file_name"]:
            raise ValueError(
                f"images '{other}' and '{image['file_name']}' would share the file '{path}', which "
                "differs from theirs in the ending only; rename one of them"
            )
        paths[image["id"]] = path
        path.parent.mkdir(parents=True, exist_ok=True)
    return paths


def find_images(folder: Path) -> dict[str, str]:
    """Return name without ending -> name, of all images below `folder`, as posix paths.

    Raises:
        ValueError: two names differ in the ending only.
    """
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
            name = path.relative_to(folder)
            other = found.setdefault(name.with_suffix("").as_posix(), name.as_posix())
            if other != name.as_posix():
                raise ValueError(
                    f"'{folder}': '{other}' and '{name}' differ in the ending only; annotations "
                    "name images without it: rename one of them"
                )
    return found


def files_below(folder: Path, suffix: str) -> list[Path]:
    """Return all files with an ending, in capitals or not, sorted.

    Raises:
        FileNotFoundError: there is none.
    """
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() == suffix and p.is_file())
    if not found:
        raise FileNotFoundError(f"no {suffix} file below '{folder}'")
    return found


def check_numbers(values: Iterable[str], where: str) -> list[float]:
    """Return finite numbers of text.

    Raises:
        DatasetError: one is none.
    """
    try:
        numbers = [float(value) for value in values]
    except ValueError as error:
        raise DatasetError(f"{where}: {error}") from error
    if not np.isfinite(numbers).all():
        raise DatasetError(f"{where}: expected finite numbers")
    return numbers


def read_coco_dataset(
    path: Path, images: Path | None = None, lost: Counter[str] | None = None
) -> dict[str, Any]:
    """Read a COCO JSON file.

    Args:
        path: the file.
        images: not used.
        lost: not used, COCO holds everything.

    Raises:
        DatasetError: one line for each defect; `tools/check_data.py --fix` repairs them.
    """
    data = read_json(str(path), str(path))
    problems = Problems(str(path))
    tables = check_coco(data, problems, problems, Problems(str(path)))
    for number, image in tables.images.items():
        what = path_problem(image.get("file_name"), ".")
        if what:
            problems.add(f"image {number}", "file_name", what)
    problems.raise_if_any()
    categories = list(tables.categories.values())
    extra = {k: v for k, v in data.items() if k in ("info", "licenses", "videos")}
    parts = {"images": list(tables.images.values()), "annotations": tables.annotations}
    return {**extra, **parts, "categories": categories}


def write_coco_dataset(coco: Mapping[str, Any], path: Path) -> Counter[str]:
    """Write a COCO JSON file, which holds everything."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "w") as file:
        json.dump(coco, file, allow_nan=False)
    return Counter()
