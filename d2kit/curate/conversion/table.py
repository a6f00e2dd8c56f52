"""CSV: a line per box, with file, corners and class, with or without a line of titles."""

from __future__ import annotations

import csv
import io
from collections import Counter
from pathlib import Path
from typing import Any

from d2kit.curate.conversion.common import CocoBuilder, SizedImages
from d2kit.curate.conversion.foreign import ImageFinder, check_numbers, read_text
from d2kit.data.datasets.validate import DatasetError, short

TITLES = {
    "file": ("file", "filename", "file_name", "image", "image_path", "path", "image_id", "img"),
    "x0": ("x0", "xmin", "x_min", "left", "x1", "bbox_x1"),
    "y0": ("y0", "ymin", "y_min", "top", "y1", "bbox_y1"),
    "x1": ("xmax", "x_max", "right", "x2", "x1", "bbox_x2"),
    "y1": ("ymax", "y_max", "bottom", "y2", "y1", "bbox_y2"),
    "x": ("x", "bbox_x"),
    "y": ("y", "bbox_y"),
    "w": ("w", "width", "bbox_width", "bbox_w"),
    "h": ("h", "height", "bbox_height", "bbox_h"),
    "class": ("class", "label", "class_name", "name", "category", "classname", "label_name"),
}
"""Meaning -> titles of columns, in small letters, the surest first."""
PLAIN = ("file", "x0", "y0", "x1", "y1", "class")


def read_csv(
    path: Path, images: Path | None = None, lost: Counter[str] | None = None
) -> dict[str, Any]:
    """Read lines of file, x0, y0, x1, y1, class; titles may name the columns in another order.

    Corners are in pixels, or all in [0, 1]: shares of the image. With titles x, y, w, h (or width,
    height) instead, a box is its corner and size. A line with a file alone is an image without
    objects. Without a column of classes all are "object".

    Args:
        path: the file, or the folder that has one.
        images: image folder that names are relative to, by default that of the file.
        lost: counts images without a file.

    Raises:
        DatasetError: columns without a meaning; one line for each problem.
    """
    file = path if path.is_file() else _only_file(path)
    rows, columns = _rows(file)
    finder = ImageFinder(images or file.parent)
    builder = CocoBuilder(file, None, lost, finder)
    found = SizedImages(builder, finder)
    found.survey(row[columns["file"]] for _, row in rows)
    corners = "x0" in columns
    keys = ("x0", "y0", "x1", "y1") if corners else ("x", "y", "w", "h")
    boxes = []
    for number, row in rows:
        cells = [row[columns[k]].strip() for k in keys]
        where = f"{file}: line {number}"
        boxes.append(check_numbers(cells, where) if any(cells) else None)
    shares = max((v for box in boxes if box for v in box), default=0) <= 1
    for (number, row), box in zip(rows, boxes, strict=True):
        image_id = found.id(row[columns["file"]])
        if image_id is None or box is None:
            continue
        image = builder.images[image_id - 1]
        scale = (image["width"], image["height"]) if shares else (1, 1)
        x, y, x1, y1 = (v * scale[i % 2] for i, v in enumerate(box))
        w, h = (x1 - x, y1 - y) if corners else (x1, y1)
        name = row[columns["class"]].strip() if "class" in columns else "object"
        builder.add(image_id, name, [x, y, w, h], f"{file}: line {number}")
    return builder.finish()


def is_table(file: Path) -> bool:
    """Whether a CSV file has the columns that `read_csv` needs."""
    try:
        _rows(file, limit=2)
    except (ValueError, OSError):
        return False
    return True


def _only_file(folder: Path) -> Path:
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() == ".csv" and is_table(p))
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "none"
        raise DatasetError(f"{folder}: expected one CSV file of boxes, got {names}; name it")
    return found[0]


def _rows(file: Path, limit: int = 0) -> tuple[list[tuple[int, list[str]]], dict[str, int]]:
    """Return lines with their numbers, and meaning -> column."""
    text = read_text(file)
    first = text.partition("\n")[0]
    mark = max(",;\t", key=first.count)
    reader = csv.reader(io.StringIO(text), delimiter=mark)
    rows: list[tuple[int, list[str]]] = []
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                rows.append((reader.line_num, row))
            if limit and len(rows) >= limit:
                break
    except csv.Error as error:
        raise DatasetError(f"{file}: line {reader.line_num}: {error}") from error
    if not rows:
        raise DatasetError(f"{file}: empty; expected lines of {', '.join(PLAIN)}")
    columns = _columns([cell.strip().lower() for cell in rows[0][1]])
    if columns:
        rows = rows[1:]
    elif len(rows[0][1]) == len(PLAIN):
        columns = {key: i for i, key in enumerate(PLAIN)}
        check_numbers([c for c in rows[0][1][1:5] if c.strip()], f"{file}: line 1")
    else:
        what = f"titles, or {len(PLAIN)} columns {', '.join(PLAIN)}"
        raise DatasetError(f"{file}: line 1: expected {what}, got {short(rows[0][1])}")
    width = max(columns.values()) + 1
    for number, row in rows:
        if len(row) < width:
            raise DatasetError(f"{file}: line {number}: expected {width} cells, got {len(row)}")
    return rows, columns


def _columns(titles: list[str]) -> dict[str, int]:
    """Return meaning -> column; nothing where the line is none of titles."""
    found: dict[str, int] = {}
    # x1 is the first corner beside x2 and the second one beside x0.
    later = {"x1", "y1"} if {"x0", "y0"} & set(titles) else set()
    for meaning, known in TITLES.items():
        for title in known:
            taken = title in titles and titles.index(title) in found.values()
            wrong = meaning in ("x0", "y0") and title in later
            if title in titles and not taken and not wrong:
                found[meaning] = titles.index(title)
                break
    if "file" not in found:
        return {}
    if all(k in found for k in ("x0", "y0", "x1", "y1")):
        return {k: found[k] for k in PLAIN if k in found}
    if all(k in found for k in ("x", "y", "w", "h")):
        return {k: found[k] for k in ("file", "x", "y", "w", "h", "class") if k in found}
    return {}
