"""Mending of single fields of COCO annotations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from d2kit.data._findings import reaches_far
from d2kit.data.datasets._rle import rle_problem
from d2kit.data.datasets._validate import all_numbers, is_number

__all__ = ["finite", "mend_box", "mend_segmentation", "to_integer", "to_numbers"]


def finite(value: Any) -> Any:
    """Copy JSON content with None instead of NaN and Infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_integer(value: Any) -> int | None:
    """Return an integer that was written as text, as a float or as a truth value; else None."""
    number = int(value) if isinstance(value, bool) else to_numbers(value)
    if is_number(number) and number == int(number) and abs(number) < 2**63:
        return int(number)
    return None


def to_numbers(value: Any) -> Any:
    """Replace text that is a finite number by the number, in lists too; the rest stays."""
    if isinstance(value, list):
        return [to_numbers(v) for v in value]
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            return value
        if not math.isfinite(number):
            return value
        return int(number) if number.is_integer() else number
    return value


def mend_segmentation(a: Mapping[str, Any], width: int, height: int) -> Any:
    """Return the mask of an annotation in a form that can be used.

    Args:
        a: the annotation.
        width: of the image in pixels.
        height: of the image in pixels.

    Returns:
        Polygons, a run-length mask, or None where nothing is to be changed.
    """
    masks = a.get("segmentation")
    if isinstance(masks, dict):
        return None  # a damaged run-length mask does not tell what it was
    polygons = _polygons(masks) if isinstance(masks, list) else []
    polygons = [_near(p, width, height) for p in polygons]
    if not a.get("iscrowd"):
        if masks and all(polygon == [] for polygon in masks):
            return []  # some programs write [[]] for "no mask"
        # Where nothing is left, the check names what was there.
        return polygons or None
    if not polygons and all_numbers(a.get("bbox")) and len(a["bbox"]) == 4:
        x, y, w, h = mend_box(a, width, height) or a["bbox"]
        polygons = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    return _run_lengths(polygons, width, height) if polygons else None


def _polygons(masks: list[Any]) -> list[list[float]]:
    """Return the polygons that are whole; a flat list, or a list of points, is one."""
    if masks and all_numbers(masks):
        masks = [masks]
    flat = [_flat(polygon) for polygon in masks if isinstance(polygon, list)]
    return [p for p in flat if all_numbers(p) and len(p) >= 6 and len(p) % 2 == 0]


def _near(polygon: list[float], width: int, height: int) -> list[float]:
    """Return a polygon whose points lie at most an image size beyond the image."""
    if not reaches_far(polygon, width, height):
        return polygon
    return [min(max(v, 0), (width, height)[i % 2]) for i, v in enumerate(polygon)]


def _flat(polygon: list[Any]) -> list[Any]:
    if polygon and all(isinstance(point, list) and len(point) == 2 for point in polygon):
        return [value for point in polygon for value in point]
    return polygon


def _run_lengths(polygons: list[list[float]], width: int, height: int) -> dict[str, Any]:
    from pycocotools import mask as mask_util

    rle = mask_util.merge(mask_util.frPyObjects(polygons, height, width))
    return {"size": [height, width], "counts": rle["counts"].decode()}


def mend_box(a: Mapping[str, Any], width: int, height: int) -> list[float] | None:
    """Return the box of an annotation with positive size, inside its image.

    Args:
        a: the annotation, its mask mended.
        width: of the image in pixels.
        height: of the image in pixels.

    Returns:
        [x, y, width, height], or None where it cannot be told.
    """
    box = a.get("bbox")
    if not all_numbers(box) or len(box) != 4 or 0 in box[2:]:  # type: ignore[arg-type,index]
        box = _box_of(a.get("segmentation"), width, height)
        if box is None:
            return None
    x, y, w, h = box  # type: ignore[misc]
    if w < 0:
        x, w = x + w, -w
    if h < 0:
        y, h = y + h, -h
    inside = x >= -1 and y >= -1 and x + w <= width + 1 and y + h <= height + 1
    if inside or x >= width or y >= height or x + w <= 0 or y + h <= 0:
        return [x, y, w, h]  # one that lies wholly outside is left to the check
    x0, y0 = max(x, 0), max(y, 0)
    return [x0, y0, min(x + w, width) - x0, min(y + h, height) - y0]


def _box_of(masks: Any, width: int, height: int) -> list[float] | None:
    """Return the box around a mask."""
    if isinstance(masks, dict):
        if rle_problem(masks, height, width):
            return None
        from pycocotools import mask as mask_util

        counts = masks["counts"]
        rle = mask_util.frPyObjects(masks, height, width) if isinstance(counts, list) else masks
        return [float(v) for v in mask_util.toBbox(rle)]
    polygons = _polygons(masks) if isinstance(masks, list) else []
    if not polygons:
        return None
    xs = [x for polygon in polygons for x in polygon[::2]]
    ys = [y for polygon in polygons for y in polygon[1::2]]
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
