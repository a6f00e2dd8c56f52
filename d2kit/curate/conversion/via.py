"""VGG Image Annotator, version 2 (and 1): a JSON file or a CSV file of regions."""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from d2kit.curate.conversion.common import CocoBuilder, SizedImages, turned_ellipse
from d2kit.curate.conversion.foreign import ImageFinder, check_numbers, read_text
from d2kit.data.datasets.validate import DatasetError, read_json, short

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
    file = path if path.is_file() else _only_file(path)
    finder = ImageFinder(images or file.parent)
    builder = CocoBuilder(file, None, lost, finder)
    found = SizedImages(builder, finder)
    entries = list(_rows(file) if file.suffix.lower() == ".csv" else _entries(file))
    found.survey(name for name, _, _, _ in entries)
    for name, region, attributes, where in entries:
        image_id = found.id(name)
        if image_id is None or region is None:
            continue
        shape = _shape(region, where)
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


def _only_file(folder: Path) -> Path:
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


def _shape(region: Any, where: str) -> Any:
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


def _class(attributes: Any, where: str, lost: Counter[str]) -> str:
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
