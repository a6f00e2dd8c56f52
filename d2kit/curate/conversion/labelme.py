"""labelme: one JSON file per image."""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
import posixpath
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from d2kit.curate.conversion.common import (
    CocoBuilder,
    annotations_by_image,
    class_names,
    decode_mask,
    encode_mask,
    files_below,
    polygon_box,
    side_files,
    turned_ellipse,
)
from d2kit.curate.conversion.foreign import MAX_SIDE, ImageFinder, check_reach
from d2kit.data.datasets.validate import all_numbers, read_json, short
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
            found, what = _shape(shape, width, height)
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


def _embedded_size(text: str) -> Any:
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


def _shape(shape: Any, width: int, height: int) -> tuple[Any, str]:
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
