"""Label Studio: its JSON export, and the short form of it (JSON-MIN)."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from d2kit.curate.conversion.common import CocoBuilder, SizedImages, turned_ellipse
from d2kit.curate.conversion.foreign import ImageFinder, check_numbers, read_text
from d2kit.data.datasets.validate import DatasetError, short

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
    file = path if path.is_file() else _only_file(path)
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
            shape = _shape(kind, value, size, place)
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


def _only_file(folder: Path) -> Path:
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
    return data


def _id(task: Any, number: int) -> str:
    return str(task.get("id", number)) if isinstance(task, dict) else str(number)


def _file_of(task: Any, finder: ImageFinder, where: str) -> str:
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


def _regions(task: Any, where: str, lost: Counter[str]) -> list[tuple[str, Any]] | None:
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


def _shape(kind: str, value: Any, size: tuple[int, int], where: str) -> Any:
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
