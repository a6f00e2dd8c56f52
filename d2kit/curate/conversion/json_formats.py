"""Formats of annotation tools in JSON: labelme, VGG Image Annotator, Label Studio."""

from __future__ import annotations

import base64
import binascii
import csv
import io
import json
import math
import posixpath
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np

from d2kit.curate.conversion.common import (
    CocoBuilder,
    SizedImages,
    annotations_by_image,
    class_names,
    decode_mask,
    encode_mask,
    files_below,
    polygon_box,
    side_files,
    turned_ellipse,
)
from d2kit.curate.conversion.foreign import (
    MAX_SIDE,
    ImageFinder,
    check_numbers,
    check_reach,
    read_text,
)
from d2kit.data.datasets.validate import DatasetError, all_numbers, read_json, short
from d2kit.utils.file_io import atomic_write

NO_AREA = ("point", "points", "line", "linestrip")


def read_labelme(
    path: Path, images: Path | None = None, lost: Counter[str] | None = None
) -> dict[str, Any]:
    """Read all JSON files below a folder.

    Rectangles become boxes; polygons, circles and masks become masks. Shapes of one label and one
    ``group_id`` are parts of one object. Embedded pictures are not read.

    Args:
        path: the folder; ``imagePath`` is relative to the file that has it.
        images: image folder that names are relative to, by default `path`.
        lost: counts points and lines, and images whose file was not found.
    """
    builder = CocoBuilder(path, lost=lost, finder=ImageFinder(images or path))
    for file in files_below(path, ".json"):
        data = read_json(str(file), str(file))
        shapes, name = data.get("shapes"), data.get("imagePath")
        size: Any = (data.get("imageWidth"), data.get("imageHeight"))
        if size == (None, None) and isinstance(data.get("imageData"), str):
            size = _embedded_size(data["imageData"])
        if not isinstance(shapes, list) or not isinstance(name, str) or not _sizes(size):
            what = "expected 'shapes', 'imagePath', 'imageWidth' and 'imageHeight'"
            builder.problems.add(str(file), "top level", what)
            continue
        if images is None:
            beside = file.relative_to(path).parent / name.replace("\\", "/")
            name = posixpath.normpath(beside.as_posix())
        width, height = size
        image_id = builder.image(name, width, height, file.parent)
        parts: dict[Any, list[list[float]]] = {}
        for number, shape in enumerate(shapes):
            if isinstance(shape, dict) and shape.get("shape_type") in NO_AREA:
                builder.lost[f"shapes of type {shape['shape_type']}"] += 1
                continue
            found, what = _labelme_shape(shape, width, height)
            if what:
                builder.problems.add(str(file), f"shape {number}", what)
                continue
            group = shape.get("group_id")
            crowd = int(bool((shape.get("flags") or {}).get("iscrowd")))
            polygons = isinstance(found, list) and isinstance(found[0], list)
            if polygons and group is not None:
                key = (shape["label"], str(group))
                if key in parts:
                    for polygon in found:
                        check_reach(polygon, width, height, f"{file}: shape {number}")
                    parts[key] += found
                    continue
                parts[key] = found
            where = f"{file}: shape {number}"
            builder.add(image_id, shape["label"], found, where, iscrowd=crowd)
        _refresh(builder)
    return builder.finish()


def _embedded_size(text: str) -> tuple[int, int] | tuple[None, None]:
    """Return the (width, height) of an embedded picture; labelme 3 wrote no sizes."""
    from d2kit.data.detection_utils import open_image

    try:
        return open_image(base64.b64decode(text, validate=True), "imageData").size
    except (ValueError, OSError, binascii.Error):
        return None, None


def _sizes(size: tuple[Any, Any]) -> bool:
    return all(type(s) is int and 0 < s <= MAX_SIDE for s in size)


def _refresh(builder: CocoBuilder) -> None:
    """Compute the boxes of objects again that got further parts."""
    for _, entry in builder.found:
        if isinstance(entry.get("segmentation"), list):
            entry["bbox"] = polygon_box(entry["segmentation"])


def _labelme_shape(shape: object, width: int, height: int) -> tuple[Any, str]:
    """Return a box, polygons or a mask, and what is wrong."""
    if not isinstance(shape, dict) or not isinstance(shape.get("label"), str):
        return None, "expected an object with a 'label'"
    points, kind = shape.get("points"), shape.get("shape_type") or "polygon"
    if not isinstance(points, list) or not all(all_numbers(p) and len(p) == 2 for p in points):
        return None, "points: expected [[x, y], ...]"
    if kind in ("polygon", "rotation") and len(points) >= 3:
        return [[float(v) for point in points for v in point]], ""
    # Some programs write all four corners of a rectangle.
    if (kind == "rectangle" and len(points) in (2, 4)) or (kind == "mask" and len(points) == 2):
        (x0, y0), (x1, y1) = np.min(points, 0).tolist(), np.max(points, 0).tolist()
        if kind == "rectangle":
            return [x0, y0, x1 - x0, y1 - y0], ""
        return _mask(shape.get("mask"), round(x0), round(y0), width, height)
    if kind == "circle" and len(points) == 2:
        (x, y), edge = points
        if max(abs(v) for point in points for v in point) > 2 * MAX_SIDE:
            return None, f"points: far outside of the image: {short(points)}"
        radius = math.dist((x, y), edge)
        return [turned_ellipse(x, y, radius, radius)], ""
    what = "a polygon, rectangle, circle or mask with its points"
    return None, f"shape_type: expected {what}, got {kind!r:.40} with {len(points)} points"


def _mask(text: Any, x: int, y: int, width: int, height: int) -> tuple[Any, str]:
    """Return the mask that a labelme file holds as a PNG of the object's box."""
    from d2kit.data.detection_utils import load_upright, open_image

    try:
        raw = base64.b64decode(text, validate=True)
        part = np.asarray(load_upright(open_image(raw, "mask"), "mask")) != 0
    except (TypeError, ValueError, OSError, binascii.Error) as error:
        return None, f"mask: expected a PNG in base64 ({error})"
    h, w = part.shape[:2]
    if part.ndim != 2 or min(x, y) < 0 or x + w > width or y + h > height:
        return None, f"mask of {w} x {h} pixels at {x}, {y} does not fit into its image"
    mask = np.zeros((height, width), bool)
    mask[y : y + h, x : x + w] = part
    return encode_mask(mask), ""


def write_labelme(coco: Mapping[str, Any], path: Path) -> Counter[str]:
    """Write ``<image>.json`` for each image, to lie beside it."""
    lost: Counter[str] = Counter()
    names, of_image = class_names(coco), annotations_by_image(coco, lost)
    files = side_files(coco, path, ".json")
    for image in coco["images"]:
        shapes = []
        for a in of_image[image["id"]]:
            crowd = {"iscrowd": True} if a.get("iscrowd") else {}
            shapes += [
                {"label": names[a["category_id"]], "description": "", "flags": crowd, **shape}
                for shape in _shapes(a, image["height"], image["width"])
            ]
        content = {
            "version": "5.5.0",
            "flags": {},
            "shapes": shapes,
            "imagePath": PurePosixPath(image["file_name"]).name,
            "imageData": None,
            "imageHeight": image["height"],
            "imageWidth": image["width"],
        }
        with atomic_write(files[image["id"]], "w") as file:
            json.dump(content, file, ensure_ascii=False, indent=1)
    return +lost


def _shapes(a: Mapping[str, Any], height: int, width: int) -> list[dict[str, Any]]:
    masks = a.get("segmentation")
    if isinstance(masks, dict):
        from PIL import Image

        mask = decode_mask(masks, height, width)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        y0, y1, x0, x1 = (int(v) for v in (rows[0], rows[-1], columns[0], columns[-1]))
        buffer = io.BytesIO()
        Image.fromarray(mask[y0 : y1 + 1, x0 : x1 + 1].astype(np.uint8) * 255).save(buffer, "PNG")
        text = base64.b64encode(buffer.getvalue()).decode()
        points = [[x0, y0], [x1, y1]]
        return [{"shape_type": "mask", "points": points, "group_id": None, "mask": text}]
    if masks:
        group = a["id"] if len(masks) > 1 else None
        return [
            {
                "shape_type": "polygon",
                "points": [[*pair] for pair in zip(p[::2], p[1::2], strict=True)],
                "group_id": group,
            }
            for p in masks
        ]
    x, y, w, h = a["bbox"]
    return [{"shape_type": "rectangle", "points": [[x, y], [x + w, y + h]], "group_id": None}]


CLASS_KEYS = ("class", "label", "name", "category", "type", "object", "species")
COLUMNS = {"filename", "region_shape_attributes", "region_attributes"}


def read_via(
    path: Path, images: Path | None = None, lost: Counter[str] | None = None
) -> dict[str, Any]:
    """Read a project, or an export of its annotations as JSON or CSV.

    The class is the region's only attribute, or the one called class, label, name, ...; a region
    without any is an "object". Sizes are those of the image files.

    Args:
        path: the file, or the folder that has one of them.
        images: image folder that names are relative to, by default that of the file.
        lost: counts points, lines, images without a file and regions without a class.

    Raises:
        DatasetError: no file of VIA; one line for each problem.
    """
    file = path if path.is_file() else _via_file(path)
    finder = ImageFinder(images or file.parent)
    builder = CocoBuilder(file, None, lost, finder)
    found = SizedImages(builder, finder)
    entries = list(_rows(file) if file.suffix.lower() == ".csv" else _entries(file))
    found.survey(name for name, _, _, _ in entries)
    for name, region, attributes, where in entries:
        image_id = found.id(name)
        if image_id is None or region is None:
            continue
        shape = _via_shape(region, where)
        if shape is None:
            builder.lost[f"regions of type {short(region.get('name'))}"] += 1
            continue
        builder.add(image_id, _class(attributes, where, builder.lost), shape, where)
    return builder.finish()


def is_via(file: Path) -> bool:
    """Whether a JSON or CSV file looks like one of VIA."""
    try:
        if file.suffix.lower() == ".csv":
            with open(file, encoding="utf-8-sig") as lines:
                return set(next(csv.reader([lines.readline(2**16)]), [])) >= COLUMNS
        data = json.loads(read_text(file))
    except (ValueError, RecursionError, OSError):
        return False
    if isinstance(data, dict):
        data = data.get("_via_img_metadata", data)
    values = list(data.values()) if isinstance(data, dict) else []
    return bool(values) and all(isinstance(v, dict) and "regions" in v for v in values[:3])


def _via_file(folder: Path) -> Path:
    found = sorted(
        p for p in folder.iterdir() if p.suffix.lower() in (".json", ".csv") and is_via(p)
    )
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "none"
        raise DatasetError(f"{folder}: expected one JSON or CSV file of VIA, got {names}; name it")
    return found[0]


def _entries(file: Path) -> Iterator[tuple[str, Any, Any, str]]:
    """Yield (image, shape or None, attributes, place) of a JSON file."""
    data = read_json(str(file), str(file))
    data = data.get("_via_img_metadata", data)
    for key, entry in data.items():
        where = f"{file}: entry {short(key)}"
        if not isinstance(entry, dict) or not isinstance(entry.get("filename"), str):
            raise DatasetError(f"{where}: expected an object with 'filename' and 'regions'")
        yield entry["filename"], None, None, where
        regions = entry.get("regions", [])
        regions = list(regions.values()) if isinstance(regions, dict) else regions  # VIA 1
        if not isinstance(regions, list):
            raise DatasetError(f"{where}: regions: expected a list, got {short(regions)}")
        for number, region in enumerate(regions):
            place = f"{where}: region {number}"
            shape = region.get("shape_attributes") if isinstance(region, dict) else None
            if not isinstance(shape, dict):
                raise DatasetError(f"{place}: shape_attributes: expected an object")
            yield entry["filename"], shape, region.get("region_attributes"), place


def _rows(file: Path) -> Iterator[tuple[str, Any, Any, str]]:
    """Yield the same of a CSV file."""
    reader = csv.DictReader(io.StringIO(read_text(file)))
    if not set(reader.fieldnames or []) >= COLUMNS:
        raise DatasetError(f"{file}: line 1: expected VIA's columns {sorted(COLUMNS)}")
    try:
        for row in reader:
            where = f"{file}: line {reader.line_num}"
            cells = [row.get(k) or "{}" for k in ("region_shape_attributes", "region_attributes")]
            try:
                shape, attributes = (json.loads(cell) for cell in cells)
            except (ValueError, RecursionError) as error:
                raise DatasetError(f"{where}: expected JSON in its cells ({error})") from error
            yield row["filename"] or "", shape or None, attributes, where
    except csv.Error as error:
        raise DatasetError(f"{file}: line {reader.line_num}: {error}") from error


def _via_shape(region: object, where: str) -> Any:
    """Return a box or polygons; None for what has no area."""
    if not isinstance(region, dict):
        raise DatasetError(f"{where}: expected an object, got {short(region)}")
    kind = region.get("name")
    keys = {
        "rect": ("x", "y", "width", "height"),
        "circle": ("cx", "cy", "r"),
        "ellipse": ("cx", "cy", "rx", "ry"),
    }
    if kind in ("polygon", "polyline"):
        xs, ys = region.get("all_points_x"), region.get("all_points_y")
        if not isinstance(xs, list) or not isinstance(ys, list) or len(xs) != len(ys):
            raise DatasetError(f"{where}: all_points_x and all_points_y: expected equal lists")
        if kind == "polyline":
            return None
        points = check_numbers([v for pair in zip(xs, ys, strict=True) for v in pair], where)
        if len(points) < 6:
            raise DatasetError(f"{where}: expected at least 3 points, got {len(points) // 2}")
        return [points]
    if kind not in keys:
        return None
    values = check_numbers([region.get(k, "") for k in keys[kind]], where)
    if kind == "rect":
        return values
    values = [*values, values[2]] if kind == "circle" else values
    turn = check_numbers([region.get("theta", 0)], where)[0]
    # theta is in radians, as the browser's canvas has it.
    x, y, rx, ry = values
    return [turned_ellipse(x, y, rx, ry, math.degrees(turn))]


def _class(attributes: object, where: str, lost: Counter[str]) -> str:
    given: Mapping[str, Any] = attributes if isinstance(attributes, dict) else {}
    texts = {}
    for key, value in given.items():
        chosen = [k for k, on in value.items() if on] if isinstance(value, dict) else [value]
        if len(chosen) == 1 and str(chosen[0]).strip():
            texts[key] = str(chosen[0]).strip()
    if not texts:
        lost["regions without a class (read as 'object')"] += 1
        return "object"
    named = [key for key in CLASS_KEYS for given_key in texts if given_key.lower() == key]
    by_lower = {key.lower(): text for key, text in texts.items()}
    if named:
        return by_lower[named[0]]
    if len(texts) > 1:
        raise DatasetError(
            f"{where}: region_attributes: which of {sorted(texts)} is the class? Rename it "
            "'class' in VIA"
        )
    return next(iter(texts.values()))


UPLOAD = re.compile(r"^[0-9a-f]{8}-")
"""What Label Studio puts before the names of uploaded files."""


def read_label_studio(
    path: Path, images: Path | None = None, lost: Counter[str] | None = None
) -> dict[str, Any]:
    """Read rectangles, polygons and ellipses; of several annotations of a task the first counts.

    Args:
        path: the JSON file, or the folder that has one.
        images: image folder that names are relative to, by default that of the file.
        lost: counts other kinds of regions, further annotations, skipped tasks, missing files.

    Raises:
        DatasetError: no export of Label Studio; the task and field that are wrong.
    """
    file = path if path.is_file() else _label_studio_file(path)
    tasks = _tasks(file)
    finder = ImageFinder(images or file.parent)
    builder = CocoBuilder(file, None, lost, finder)
    found = SizedImages(builder, finder)
    named = [_file_of(task, finder, f"{file}: task {_id(task, i)}") for i, task in enumerate(tasks)]
    found.survey(named)
    for number, (task, name) in enumerate(zip(tasks, named, strict=True)):
        where = f"{file}: task {_id(task, number)}"
        regions = _regions(task, where, builder.lost)
        image_id = found.id(name) if regions is not None else None
        if image_id is None:
            continue
        image = builder.images[image_id - 1]
        size = image["width"], image["height"]
        for i, (kind, value) in enumerate(regions or ()):
            place = f"{where}: region {i}"
            shape = _label_studio_shape(kind, value, size, place)
            labels = value.get(kind) if isinstance(value, dict) else None
            if shape is None:
                builder.lost[f"regions of type {kind:.40}"] += 1
            elif not isinstance(labels, list) or not labels:
                builder.lost["regions without a label"] += 1
            else:
                builder.add(image_id, str(labels[0]), shape, place)
    return builder.finish()


def is_label_studio(file: Path) -> bool:
    """Whether a JSON file looks like an export of Label Studio."""
    try:
        return bool(_tasks(file))
    except (ValueError, OSError):
        return False


def _label_studio_file(folder: Path) -> Path:
    found = sorted(p for p in folder.glob("*.json") if is_label_studio(p))
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "none"
        raise DatasetError(f"{folder}: expected one export of Label Studio, got {names}; name it")
    return found[0]


def _tasks(file: Path) -> list[Any]:
    try:
        data = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{file}: not valid JSON ({error})") from error
    first = data[0] if isinstance(data, list) and data else None
    full = isinstance(first, dict) and isinstance(first.get("data"), dict)
    if not isinstance(first, dict) or not (full or "annotation_id" in first or "label" in first):
        raise DatasetError(f"{file}: expected Label Studio's list of tasks, got {short(data)}")
    tasks: list[Any] = data
    return tasks


def _id(task: object, number: int) -> str:
    return str(task.get("id", number)) if isinstance(task, dict) else str(number)


def _file_of(task: object, finder: ImageFinder, where: str) -> str:
    """Return the image of a task as the finder may know it."""
    data = task.get("data", task) if isinstance(task, dict) else None
    values = list(data.values()) if isinstance(data, dict) else []
    preferred = [data.get(k) for k in ("image", "img", "url")] if isinstance(data, dict) else []
    texts = [v for v in (*preferred, *values) if isinstance(v, str) and "." in v]
    if not texts:
        raise DatasetError(f"{where}: data: expected the name of an image, got {short(data)}")
    local = parse_qs(urlsplit(texts[0]).query).get("d") if "?" in texts[0] else None
    name = local[0] if local else texts[0].partition("://")[2] or texts[0]
    if finder.find(name) is None:
        folder, _, last = name.rpartition("/")
        bare = UPLOAD.sub("", last)
        name = f"{folder}/{bare}" if finder.find(bare) else name
    return name


def _regions(
    task: Mapping[str, Any], where: str, lost: Counter[str]
) -> list[tuple[str, Any]] | None:
    """Return (kind, value) of each region; None for a task that nobody did."""
    if "data" not in task:  # the short form
        label = next((v for v in task.values() if isinstance(v, list)), [])
        return list(_short_form(label, where))
    done = task.get("annotations", task.get("completions"))
    if not isinstance(done, list):
        raise DatasetError(f"{where}: annotations: expected a list, got {short(done)}")
    valid = [a for a in done if isinstance(a, dict) and not a.get("was_cancelled")]
    if not valid:
        lost["tasks that nobody labelled"] += 1
        return None
    lost["further annotations of a task"] += len(valid) - 1
    regions = valid[0].get("result")
    if not isinstance(regions, list):
        raise DatasetError(f"{where}: result: expected a list, got {short(regions)}")
    found = []
    for i, region in enumerate(regions):
        if not isinstance(region, dict) or not isinstance(region.get("type"), str):
            raise DatasetError(f"{where}: region {i}: type: missing")
        found.append((region["type"], region.get("value")))
    return found


def _short_form(regions: Any, where: str) -> Iterator[tuple[str, Any]]:
    for i, region in enumerate(regions):
        if not isinstance(region, dict):
            raise DatasetError(f"{where}: region {i}: expected an object, got {short(region)}")
        kind = next((k for k in region if k.endswith("labels")), "unknown")
        yield kind, region


def _label_studio_shape(kind: str, value: object, size: tuple[int, int], where: str) -> Any:
    """Return a box or polygons in pixels; None for what is neither."""
    if kind not in ("rectanglelabels", "polygonlabels", "ellipselabels"):
        return None
    if not isinstance(value, dict):
        raise DatasetError(f"{where}: value: expected an object, got {short(value)}")
    width, height = size[0] / 100, size[1] / 100
    if kind == "polygonlabels":
        points = value.get("points")
        pairs = points if isinstance(points, list) else []
        if len(pairs) < 3 or not all(isinstance(p, list) and len(p) == 2 for p in pairs):
            raise DatasetError(f"{where}: points: expected at least 3 pairs, got {short(points)}")
        flat = check_numbers([v for pair in pairs for v in pair], where)
        return [[v * (width, height)[i % 2] for i, v in enumerate(flat)]]
    sides = ("width", "height") if kind == "rectanglelabels" else ("radiusX", "radiusY")
    keys = ("x", "y", *sides)
    x, y, w, h = check_numbers([value.get(k, "") for k in keys], where)
    x, y, w, h = x * width, y * height, w * width, h * height
    (degrees,) = check_numbers([value.get("rotation") or 0], where)
    if kind == "ellipselabels":
        return [turned_ellipse(x, y, w, h, degrees)]
    if not degrees % 360:
        return [x, y, w, h]
    # Label Studio turns a rectangle clockwise around its first corner.
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    corners = ((0.0, 0.0), (w, 0.0), (w, h), (0.0, h))
    return [[v for a, b in corners for v in (x + a * cos - b * sin, y + a * sin + b * cos)]]
