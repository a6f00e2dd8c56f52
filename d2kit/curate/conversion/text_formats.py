"""Formats in lines of text: YOLO and CSV."""

from __future__ import annotations

import csv
import io
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from d2kit.curate.conversion.common import (
    DIGITS,
    CocoBuilder,
    Polygons,
    SizedImages,
    annotations_by_image,
    class_names,
    decode_mask,
    find_images,
    side_files,
)
from d2kit.curate.conversion.foreign import ImageFinder, check_numbers, read_text
from d2kit.curate.findings import survey_images
from d2kit.data.datasets.validate import DatasetError, short
from d2kit.utils.file_io import atomic_write


def outlines(mask: np.ndarray) -> Polygons:
    """Return the closed lines along the edges of the pixels of a mask; those of holes too.

    Filled by the even-odd rule, as pycocotools and OpenCV do, they give back the same mask.

    Args:
        mask: (H, W) bool.

    Returns:
        Lists of x, y, x, y, ... of whole pixels, with corners only; none where the mask is empty.
    """
    padded = np.pad(mask, 1).astype(np.int8)
    # A grid point is a corner where an odd number of its four pixels is set, and two corners where
    # two pixels touch at it only.
    four = np.stack([padded[:-1, :-1], padded[1:, 1:], padded[:-1, 1:], padded[1:, :-1]])
    touching = (four[0] == four[1]) & (four[2] == four[3]) & (four[0] != four[2])
    y, x = np.nonzero((four.sum(0) % 2 == 1) | touching)
    points = np.stack([x, y], 1).repeat(1 + touching[y, x], axis=0)
    # Along each row of the grid, corners are joined in pairs; along each column likewise.
    partners = []
    for order in (np.lexsort(points.T), np.lexsort(points.T[::-1])):
        partner = np.empty(len(points), int)
        partner[order[::2]], partner[order[1::2]] = order[1::2], order[::2]
        partners.append(partner.tolist())
    corners = points.astype(float).tolist()
    seen = [False] * len(corners)
    found = []
    for start in range(len(corners)):
        line: list[float] = []
        at = start
        while not seen[at]:
            across = partners[0][at]
            seen[at] = seen[across] = True
            line += corners[at] + corners[across]
            at = partners[1][across]
        if line:
            found.append(line)
    return found


def one_line(segmentation: Any, height: int, width: int) -> list[float]:
    """Return an object as one polygon that gives the same pixels.

    Args:
        segmentation: polygons or run lengths.
        height: of the image in pixels.
        width: of the image in pixels.

    Returns:
        x, y, x, y, ...; a single polygon as it is. Several parts are joined by seams of no width.
        Where they overlap, the even-odd rule would cut a hole: the outline of its pixels fills it.
        Nothing where run lengths have no pixel.
    """
    if isinstance(segmentation, dict):
        return joined(outlines(decode_mask(segmentation, height, width)))
    line = joined(segmentation)
    if len(segmentation) == 1:
        return line
    holes = decode_mask([line], height, width) != decode_mask(segmentation, height, width)
    return joined([*segmentation, *outlines(holes)])


def joined(polygons: Polygons) -> list[float]:
    """Join polygons by seams of no width that start and end at the first point of the first."""
    if not polygons:
        return []
    first = polygons[0]
    line = [*first]
    for polygon in polygons[1:]:
        line += [*first[:2], *polygon, *polygon[:2]]
    return line if len(polygons) == 1 else [*line, *first[:2]]


CLASSES = "classes.txt"


def read_yolo(
    path: Path, images: Path | None = None, lost: Counter[str] | None = None
) -> dict[str, Any]:
    """Read text files of boxes and polygons, and ``data.yaml`` (or a list of classes).

    The labels of ``x/images/y/1.jpg`` are ``x/labels/y/1.txt``, a file of the same place in `path`
    or its folder ``labels``, or the text file beside the image (Darknet, CVAT's YOLO 1.1 with
    ``obj.names``). Of the pictures that lie around, those are the dataset's that ``train``, ``val``
    and ``test`` of the YAML name, else those in folders of labelled ones. One of them without a
    text file has no object.

    Args:
        path: the folder, or its ``data.yaml``, of which the classes are read.
        images: image folder, by default ``images`` in `path`, else `path`.
        lost: counts pictures that are not the dataset's.

    Raises:
        FileNotFoundError: no image, no labels, or no classes.
        DatasetError: one line for each problem.
    """
    base = path.parent if path.is_file() else path
    root = images or (base / "images" if (base / "images").is_dir() else base)
    names, content = _names(path, base)
    everything = find_images(root)
    labels = _labels(base, root, everything)
    known = _of_the_dataset(base, root, everything, labels, content)
    builder = CocoBuilder(path, names, lost)
    builder.lost["pictures outside of the dataset's folders"] += len(everything) - len(known)
    for file in _without_image(base, images, labels):
        builder.problems.add(str(file), "image", f"no image '{file.stem}.*' in '{root}'")
    sizes = survey_images([{"file_name": name} for name in known.values()], root)
    for stem, name in known.items():
        size = sizes[name]
        if size.problem:
            builder.problems.add(f"image '{name}'", "file", size.problem)
            continue
        image_id = builder.image(name, size.width, size.height)
        for number, line in _lines(labels.get(stem)):
            where = f"{labels[stem]}: line {number}"
            _read_line(builder, line, image_id, (size.width, size.height), names, where)
    return builder.finish()


def _labels(base: Path, root: Path, known: Mapping[str, str]) -> dict[str, Path]:
    """Return image name without ending -> its text file, of images that have one."""
    found = {}
    for stem in known:
        places = [base / "labels", base, root]
        parts = [*(root / stem).parts]
        if "images" in parts:
            parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
        files = (Path(*parts[:-1], f"{parts[-1]}.txt"), *(p / f"{stem}.txt" for p in places))
        file = next((f for f in files if f.is_file() and f.name != CLASSES), None)
        if file:
            found[stem] = file
    if not found:
        what = f"text files for its {len(known)} images" if known else "images"
        raise FileNotFoundError(f"'{base}': found no {what} (images: '{root}'; see --images)")
    return found


def _of_the_dataset(
    base: Path,
    root: Path,
    known: Mapping[str, str],
    labels: Mapping[str, Path],
    content: Mapping[str, Any],
) -> dict[str, str]:
    """Return those of the images that are the dataset's; others are results, logos, tests."""
    named = _named_places(base, content)
    if any(root / stem in named or _inside(root / stem, named) for stem in labels):
        chosen = named
    elif root.name.lower() == "images":
        return dict(known)  # a folder of that name holds nothing else
    else:
        chosen = set()
        for stem in labels:
            parts = (root / stem).parent.parts
            at = [i for i, part in enumerate(parts) if part == "images"]
            chosen.add(Path(*parts[: at[-1] + 1]) if at else Path(*parts) / "*")
    return {
        stem: name
        for stem, name in known.items()
        if stem in labels
        or root / stem in chosen
        or (root / stem).parent / "*" in chosen
        or _inside(root / stem, chosen)
    }


def _inside(path: Path, folders: Collection[Path]) -> bool:
    return any(parent in folders for parent in path.parents)


def _named_places(base: Path, content: Mapping[str, Any]) -> set[Path]:
    """Return folders, and images without their ending, that train, val and test name."""
    places: set[Path] = set()
    given = content.get("path")
    roots = [base / given, base] if isinstance(given, str) else [base]
    for key in ("train", "val", "valid", "test"):
        entries = content.get(key)
        for entry in entries if isinstance(entries, list) else [entries]:
            if not isinstance(entry, str):
                continue
            # Roboflow's files say ../train/images of what lies beside them.
            texts = (entry, entry.removeprefix("../"))
            tries = (Path(os.path.normpath(r / text)) for r in roots for text in texts)
            place = next((p for p in tries if p.exists() and p != base), None)
            if place is not None and place.is_file() and place.suffix == ".txt":
                for _, line in _lines(place):
                    places.update(
                        Path(os.path.normpath(r / line.strip())).with_suffix("") for r in roots
                    )
            elif place is not None:
                places.add(place)
    return places


def _without_image(base: Path, images: Path | None, labels: Mapping[str, Path]) -> list[Path]:
    """Return the text files in folders of labels that belong to no image."""
    used = set(labels.values())
    if images is None:
        files = {f for f in base.rglob("*.txt") if "labels" in f.relative_to(base).parts}
    else:
        files = {f for folder in {f.parent for f in used} for f in folder.glob("*.txt")}
        files = {f for f in files if f.parent != base or base.name == "labels"}
    return sorted(
        f for f in files - used if f.name != CLASSES and not f.name.startswith((".", "README"))
    )


def _names(path: Path, base: Path) -> tuple[list[str], dict[str, Any]]:
    """Return the classes and the rest of ``data.yaml``, also of a folder above; or a list of them.

    Lists are ``classes.txt``, Darknet's and CVAT's ``obj.names``, Roboflow's ``_darknet.labels``.
    """
    places = [base / "data.yaml", base.parent / "data.yaml", base / CLASSES]
    if base.is_dir():
        others = [*sorted(base.glob("*.yaml")), *sorted(base.glob("*.yml"))]
        places += [p for p in others if re.search(r"(?m)^names\s*:", read_text(p))]
    places = [path] if path.is_file() else [*places, base / "labels" / CLASSES]
    for pattern in ("*.names", "*/*.names", "_darknet.labels", "*/_darknet.labels"):
        places += sorted(base.glob(pattern)) if not path.is_file() else []
    file = next((p for p in places if p.is_file()), None)
    if file is None:
        raise FileNotFoundError(
            f"'{places[0]}' does not exist; expected 'names: [class, ...]'; "
            "INPUT may be the YAML file itself"
        )
    text = read_text(file)
    if file.suffix not in (".yaml", ".yml"):
        return [line.strip() for line in text.splitlines() if line.strip()], {}
    try:
        content = yaml.safe_load(text) or {}
        names = content.get("names")
    except (yaml.YAMLError, AttributeError, ValueError, RecursionError) as error:
        raise DatasetError(
            f"{file}: not YAML of the form 'names: [class, ...]' ({error})"
        ) from error
    if "kpt_shape" in content:
        raise DatasetError(f"{file}: kpt_shape: expected boxes or polygons, got keypoints")
    if isinstance(names, dict):
        numbers = {str(k): str(v) for k, v in names.items()}
        names = [numbers.get(str(k)) for k in range(len(names))]
    if not isinstance(names, list) or not names or None in names:
        what = "expected a list of classes, or a table from 0 on without gaps"
        raise DatasetError(f"{file}: names: {what}, got {content.get('names')!r:.60}")
    return [str(name) for name in names], content


def _lines(file: Path | None) -> list[tuple[int, str]]:
    """Return the lines that are not empty, with their numbers from 1."""
    lines = read_text(file).splitlines() if file else []
    return [(i, line) for i, line in enumerate(lines, start=1) if line.strip()]


def _read_line(
    builder: CocoBuilder,
    line: str,
    image_id: int,
    size: tuple[int, int],
    names: list[str],
    where: str,
) -> None:
    kind, *values = check_numbers(line.split(), where)
    if not (kind.is_integer() and 0 <= kind < len(names)):
        raise DatasetError(f"{where}: class: expected 0 to {len(names) - 1}, got {kind:g}")
    name = names[int(kind)]
    if len(values) == 4:
        x, y, w, h = (v * size[i % 2] for i, v in enumerate(values))
        builder.add(image_id, name, [x - w / 2, y - h / 2, w, h], where)
    elif len(values) >= 6 and len(values) % 2 == 0:
        points = [round(v * size[i % 2], DIGITS) for i, v in enumerate(values)]
        builder.add(image_id, name, [points], where)
    else:
        what = "expected a class and 4 numbers (box), or at least 3 points (no confidence)"
        raise DatasetError(f"{where}: {what}, got {len(values)} numbers")


def write_yolo(coco: Mapping[str, Any], path: Path) -> Counter[str]:
    """Write ``labels/<image>.txt`` and ``data.yaml``.

    A line holds one polygon: parts of an object are joined by seams of no width, and masks become
    the outline of their pixels, so that what is read back is the same mask.
    """
    lost: Counter[str] = Counter()
    names, of_image = class_names(coco), annotations_by_image(coco, lost)
    files = side_files(coco, path / "labels", ".txt")
    index = {category: i for i, category in enumerate(names)}
    for image in coco["images"]:
        size = (image["width"], image["height"])
        lines = []
        for a in of_image[image["id"]]:
            if a.get("iscrowd"):
                lost["crowds"] += 1
                continue
            x, y, w, h = a["bbox"]
            values = [x + w / 2, y + h / 2, w, h]
            if a.get("segmentation"):
                lost["run-length masks (written as polygons)"] += isinstance(
                    a["segmentation"], dict
                )
                values = one_line(a["segmentation"], size[1], size[0]) or values
            shares = (f"{v / size[i % 2]:.9f}" for i, v in enumerate(values))
            lines.append(f"{index[a['category_id']]} {' '.join(shares)}\n")
        with atomic_write(files[image["id"]], "w") as file:
            file.writelines(lines)
    with atomic_write(path / "data.yaml", "w") as file:
        yaml.safe_dump({"nc": len(names), "names": [*names.values()]}, file, allow_unicode=True)
    return +lost


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
    file = path if path.is_file() else _csv_file(path)
    rows, columns = _csv_rows(file)
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
        _csv_rows(file, limit=2)
    except (ValueError, OSError):
        return False
    return True


def _csv_file(folder: Path) -> Path:
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() == ".csv" and is_table(p))
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "none"
        raise DatasetError(f"{folder}: expected one CSV file of boxes, got {names}; name it")
    return found[0]


def _csv_rows(file: Path, limit: int = 0) -> tuple[list[tuple[int, list[str]]], dict[str, int]]:
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
