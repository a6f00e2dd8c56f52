"""What the formats share: building COCO dictionaries, names of files, shapes."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from d2kit.curate.conversion.foreign import (
    SPLITS,
    ImageFinder,
    check_reach,
    check_size,
    image_files,
)
from d2kit.curate.findings import ImageFile, survey_images, true_area
from d2kit.data.datasets.validate import (
    DatasetError,
    Problems,
    check_coco,
    path_problem,
    read_json,
)
from d2kit.utils.file_io import atomic_write


class SizedImages:
    """Adds images to a builder with the sizes of their files; those without a file are counted.

    Args:
        builder: of the dataset.
        finder: of its images.
    """

    def __init__(self, builder: CocoBuilder, finder: ImageFinder) -> None:
        self.builder = builder
        self.finder = finder
        self._files: dict[str, ImageFile] = {}
        self._names: dict[str, str | None] = {}
        self._ids: dict[str, int] = {}

    def survey(self, given: Iterable[str]) -> None:
        """Find and decode the images that annotations name."""
        near = self.builder.source.parent
        self._names = {name: self.finder.find(name, near) for name in dict.fromkeys(given)}
        known = [{"file_name": name} for name in self._names.values() if name]
        self._files = survey_images(known, self.finder.root)

    def id(self, given: str) -> int | None:
        """Return the id of an image; None where its file is missing or damaged."""
        name = self._names[given]
        if name is None or self._files[name].problem:
            if given not in self._ids:
                self._ids[given] = -1
                what = "was not found" if name is None else "cannot be read"
                self.builder.lost[f"images whose file {what} (left out)"] += 1
            return None
        if name not in self._ids:
            file = self._files[name]
            self._ids[name] = self.builder.image(name, file.width, file.height)
        return self._ids[name]


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
        finder: of the images; names that it does not know stay as they are, and are counted.
    """

    def __init__(
        self,
        source: Path,
        names: Sequence[str] | None = None,
        lost: Counter[str] | None = None,
        finder: ImageFinder | None = None,
    ) -> None:
        self.source = source
        self.finder = finder
        self.problems = Problems(str(source))
        self.lost: Counter[str] = Counter() if lost is None else lost
        self.images: list[dict[str, Any]] = []
        self.found: list[tuple[str, dict[str, Any]]] = []
        self.names = None if names is None else list(names)

    def image(self, file_name: str, width: object, height: object, near: Path | None = None) -> int:
        """Add an image; return its id.

        Args:
            file_name: as the annotation has it.
            width: in pixels.
            height: in pixels.
            near: folder of the annotation file.

        Raises:
            DatasetError: the size is none.
        """
        name = file_name.replace("\\", "/")
        width, height = check_size(width, height, f"{self.source}: image '{name:.200}'")
        if self.finder is not None and self.finder.names:
            found = self.finder.find(file_name, near)
            if found is None:
                self.lost["images whose file was not found (kept)"] += 1
            name = found or name
        number = len(self.images) + 1
        what = path_problem(name, ".")
        if what:
            self.problems.add(f"image '{name:.200}'", "file_name", what)
        self.images.append({"id": number, "file_name": name, "width": width, "height": height})
        return number

    def add(self, image_id: int, name: str, shape: Any, where: str = "", **extra: object) -> None:
        """Add an annotation.

        Args:
            image_id: from `image`.
            name: class.
            shape: [x, y, width, height], polygons, or an uncompressed or compressed mask.
            where: place in the file, for messages.
            extra: further fields.

        Raises:
            DatasetError: it lies far outside of its image, or has no size.
        """
        self._check(self.images[image_id - 1], name, shape, where)
        entry: dict[str, Any] = {"image_id": image_id, "iscrowd": 0}
        if isinstance(shape, dict):
            entry |= {"segmentation": shape, "bbox": mask_box(shape)}
        elif shape and isinstance(shape[0], list):
            entry |= {"segmentation": shape, "bbox": polygon_box(shape)}
        else:
            entry["bbox"] = [round(float(v), DIGITS) for v in shape]
        entry |= extra
        self.found.append((name, entry))

    def _check(self, image: Mapping[str, Any], name: str, shape: Any, where: str) -> None:
        where = where or f"{self.source}: image '{image['file_name']}': object '{name:.60}'"
        if not name.strip():
            raise DatasetError(f"{where}: class: expected a name, got '{name}'")
        if isinstance(shape, dict):
            return
        size = image["width"], image["height"]
        if shape and isinstance(shape[0], list):
            for polygon in shape:
                check_reach(polygon, *size, where)
            return
        x, y, w, h = shape
        check_reach([x, y, x + w, y + h], *size, where)
        if w < 0 or h < 0:
            raise DatasetError(f"{where}: box: expected a size >= 0, got {w:g} x {h:g}")

    def finish(self) -> dict[str, Any]:
        """Return the COCO dictionary.

        Raises:
            DatasetError: one line for each problem, or there is no image or no object at all.
        """
        self.problems.raise_if_any()
        if not self.images or not self.found:
            left = ", ".join(f"{n} {what}" for what, n in sorted((+self.lost).items()))
            raise DatasetError(
                f"{self.source}: found {len(self.images)} images and {len(self.found)} objects"
                + (f"; left out: {left}" if left else "")
                + "; is it the right folder and format (docs/own_data.md has the layouts)?"
            )
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
    found: np.ndarray = (points - middle) @ matrix + middle
    return found


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
    found: list[float] = turn(points, degrees).ravel().tolist()
    return found


def mask_box(rle: Mapping[str, Any]) -> list[float]:
    """Return [x, y, width, height] around a compressed mask."""
    from pycocotools import mask as mask_util

    return [float(v) for v in mask_util.toBbox(rle)]


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Return the compressed run lengths of a (H, W) mask."""
    from pycocotools import mask as mask_util

    rle = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def decode_mask(segmentation: object, height: int, width: int) -> np.ndarray:
    """Return the (H, W) bool mask of polygons or run lengths."""
    from pycocotools import mask as mask_util

    if isinstance(segmentation, dict):
        plain = isinstance(segmentation["counts"], list)
        rle = mask_util.frPyObjects(segmentation, height, width) if plain else segmentation
    else:
        rle = mask_util.merge(mask_util.frPyObjects(segmentation, height, width))
    found: np.ndarray = mask_util.decode(rle).astype(bool)
    return found


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
    for path in image_files(folder):
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
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() == suffix
        and not path.name.startswith(".")  # "._x.xml" of macOS
        and path.is_file()
    )
    if not found:
        raise FileNotFoundError(f"no {suffix} file below '{folder}'")
    return found


def read_coco_dataset(
    path: Path, images: Path | None = None, lost: Counter[str] | None = None
) -> dict[str, Any]:
    """Read a COCO JSON file, or all of those of a folder.

    Args:
        path: the file; or a folder with one or several of them below it, as Roboflow's
            ``train/_annotations.coco.json``: they become one dataset, classes by name, images
            with a field `split` where the names of file or folder tell.
        images: folder that names are looked for in and relative to; for a folder by default
            itself, for a file names stay as they are.
        lost: counts images whose file was not found, and classes that only group others.

    Raises:
        DatasetError: one line for each defect; `d2kit check --fix` repairs them.
    """
    lost = Counter() if lost is None else lost
    if path.is_dir():
        return _read_folder(path, images or path, lost)
    coco = _read_file(path)
    _find_files(coco["images"], ImageFinder(images) if images else None, path, lost)
    if not coco["images"]:
        raise DatasetError(f"{path}: images: expected at least one, got an empty list")
    return coco


def coco_files(folder: Path) -> list[Path]:
    """Return the JSON files below a folder that have COCO's lists."""
    found = []
    for file in sorted(folder.rglob("*.json")):
        try:
            data = read_json(str(file), str(file))
        except (ValueError, OSError):
            continue
        if all(isinstance(data.get(k), list) for k in ("images", "annotations", "categories")):
            found.append(file)
    return found


def split_of(text: str) -> str:
    """Return train, val or test where a path names one of them, else nothing."""
    words = re.findall(r"[a-z]+", text.lower())
    found = {SPLITS[word] for word in words if word in SPLITS}
    return found.pop() if len(found) == 1 else ""


def _find_files(
    entries: list[dict[str, Any]], finder: ImageFinder | None, file: Path, lost: Counter[str]
) -> None:
    """Give images the names of their files; what is not found stays, unless it leads outside."""
    problems = Problems(str(file))
    for image in entries:
        found = finder.find(image["file_name"], file.parent) if finder else None
        if found is None and finder is not None:
            lost["images whose file was not found (kept)"] += 1
        image["file_name"] = found or image["file_name"]
        what = path_problem(image["file_name"], ".")
        if what:
            problems.add(f"image {image['id']}", "file_name", what)
    problems.raise_if_any()


def _without_unions(
    tables: Mapping[Path, Mapping[str, Any]], folder: Path, finder: ImageFinder, lost: Counter[str]
) -> list[Path]:
    """Leave out a file of no split (trainval.json) whose images are those of the splits' files.

    Only images that are there count: the truth of whole videos repeats the frames that were cut.

    Args:
        tables: JSON files as they were read, with whatever defects.
        folder: below which they are.
        finder: of the images.
        lost: counts.
    """
    parts = [f for f in tables if split_of(f.relative_to(folder).as_posix())]
    if len(parts) in (0, len(tables)):
        return list(tables)
    names = {file: _image_names(coco, file, finder) for file, coco in tables.items()}
    covered = set().union(*(names[f] for f in parts))
    kept = [f for f in tables if f in parts or not names[f] <= covered]
    lost["files that repeat the images of train and test"] += len(tables) - len(kept)
    return kept


def _image_names(coco: Mapping[str, Any], file: Path, finder: ImageFinder) -> set[str]:
    """Return the images that are there; where none is, the names that are given."""
    given = [i.get("file_name") for i in coco["images"] if isinstance(i, Mapping)]
    texts = {name for name in given if isinstance(name, str)}
    found = set()
    for name in texts:
        with suppress(ValueError, OSError):  # names that no file has are looked at later
            found.add(finder.find(name, file.parent))
    return {path for path in found if path is not None} or texts


def _read_folder(path: Path, root: Path, lost: Counter[str]) -> dict[str, Any]:
    files = coco_files(path)
    if not files:
        raise DatasetError(f"{path}: found no COCO JSON file below it")
    finder = ImageFinder(root)
    merged: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    numbers: dict[str, int] = {}
    owner: dict[str, Path] = {}
    read = {file: read_json(str(file), str(file)) for file in files}
    tables = {f: _read_file(f, read[f]) for f in _without_unions(read, path, finder, lost)}
    for file, coco in tables.items():
        _find_files(coco["images"], finder, file, lost)
    for file, coco in tables.items():
        ids: dict[int, int] = {}
        for image in coco["images"]:
            other = owner.setdefault(image["file_name"], file)
            if other != file:
                raise DatasetError(
                    f"{path}: '{other.relative_to(path)}' and '{file.relative_to(path)}' both "
                    f"label '{image['file_name']}': which is meant? Name the file instead of the "
                    "folder"
                )
            ids[image["id"]] = len(ids) + len(merged["images"]) + 1
        split = split_of(file.relative_to(path).as_posix())
        for image in coco["images"]:
            tag = {"split": split} if split else {}
            merged["images"].append({**image, "id": ids[image["id"]], **tag})
        used = {a["category_id"] for a in coco["annotations"]}
        above = {c.get("supercategory") for c in coco["categories"]}
        table = {}
        for category in coco["categories"]:
            # Roboflow lists a class 0 that only stands above the others.
            if category["id"] not in used and category["name"] in above:
                lost["classes that only group others"] += 1
                continue
            name = category["name"]
            if name not in numbers:
                numbers[name] = len(numbers) + 1
                merged["categories"].append({**category, "id": numbers[name]})
            table[category["id"]] = numbers[name]
        for a in coco["annotations"]:
            number = len(merged["annotations"]) + 1
            changed = {"image_id": ids[a["image_id"]], "category_id": table[a["category_id"]]}
            merged["annotations"].append({**a, "id": number, **changed})
    return merged


def _read_file(path: Path, data: dict[str, Any] | None = None) -> dict[str, Any]:
    data = read_json(str(path), str(path)) if data is None else data
    problems = Problems(str(path))
    tables = check_coco(data, problems, problems, Problems(str(path)))
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


def read_folders(
    path: Path, images: Path | None = None, lost: Counter[str] | None = None
) -> dict[str, Any]:
    """Read ``cat/1.jpg`` and ``train/cat/1.jpg``: each image is one object as large as itself.

    Such data say what is on a picture and not where: a detector of it finds what fills the picture.

    Args:
        path: the folder.
        images: folder that names are relative to, by default `path`.
        lost: counts the objects that are whole images.
    """
    root = images or path
    builder = CocoBuilder(path, None, lost)
    files = [f for f in image_files(path) if f.parent.parent == path or f.parent != path]
    files = [f for f in files if f.parent != path and f.parent.name.lower() not in SPLITS]
    names = {f.relative_to(root).as_posix(): f.parent.name for f in files}
    sizes = survey_images([{"file_name": name} for name in names], root)
    for name, label in names.items():
        if sizes[name].problem:
            builder.lost["images that cannot be read (left out)"] += 1
            continue
        width, height = sizes[name].width, sizes[name].height
        image_id = builder.image(name, width, height)
        builder.add(image_id, label, [0, 0, width, height])
        builder.lost["places of objects (each box is its whole image)"] += 1
    return builder.finish()
