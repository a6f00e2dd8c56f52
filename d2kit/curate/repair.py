"""Repair of COCO annotations: what can be mended is, what cannot is left out, and each is told."""

from __future__ import annotations

import json
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from d2kit.curate.findings import (
    SHARES,
    Finding,
    Findings,
    ImageFile,
    bounds_of_polygons,
    box_by_area,
    is_inside,
    keypoints_apart,
    mask_disagrees,
    mask_is_right,
    reaches_far,
    roots_of_classes,
    survey_images,
    true_area,
    within_one,
)
from d2kit.data.datasets.validate import (
    all_numbers,
    check_coco,
    image_problems,
    is_number,
    path_problem,
    short,
)
from d2kit.structures.masks import rle_problem
from d2kit.utils.file_io import IMAGE_SUFFIXES


def moved_files(images: Iterable[Any], folder: str | os.PathLike[str]) -> dict[str, str]:
    """Return the names of files that lie elsewhere in the image folder than their entries say.

    Absolute paths of another machine, backslashes, folders too many or too few, capitals, marks
    that are characters of their own, and names without their ending are seen through; what fits
    two files is left as it is.

    Args:
        images: entries with `file_name`.
        folder: that the names are relative to.

    Returns:
        `file_name` -> the name to use instead; only of those that can be told.
    """
    root = Path(folder)
    names = [i.get("file_name") for i in images if isinstance(i, Mapping)]
    lost = {n for n in names if isinstance(n, str) and n and not _exists(n, root)}
    if not lost:
        return {}
    files = [p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()]
    whole: dict[str, list[str]] = {}
    last: dict[str, list[str]] = {}
    for file in files:
        plain = _folded(file)
        ending = plain[plain.rfind(".") :] if "." in plain else ""
        # also without its ending, where that is a picture's
        for key in {plain, plain.removesuffix(ending) if ending in IMAGE_SUFFIXES else plain}:
            whole.setdefault(key, []).append(file)
            last.setdefault(key.rpartition("/")[2], []).append(file)
    found = {name: _nearest(name, whole, last) for name in lost}
    taken = [n for n in names if isinstance(n, str) and n not in lost]
    taken += [file for file in found.values() if file]
    return {name: file for name, file in found.items() if file and taken.count(file) == 1}


def _folded(name: str) -> str:
    """Return a name without capitals; letters with marks as one character (macOS takes apart)."""
    return unicodedata.normalize("NFC", name).lower()


def _exists(name: str, root: Path) -> bool:
    return path_problem(name, os.fspath(root)) is None and (root / name).is_file()


def _nearest(name: str, whole: Mapping[str, list[str]], last: Mapping[str, list[str]]) -> str:
    """Return the only file that has most of the last parts of a name; nothing if there is none.

    Names of web addresses (Label Studio: ``/data/local-files/?d=images/b%C3%A4r.png``) are decoded.
    """
    if "%" in name or "?" in name:
        plain = unquote(name.partition("?d=")[2] or name.partition("?")[0])
        if plain != name:
            return _nearest(plain, whole, last)
    parts = _folded(name.replace("\\", "/")).split("/")
    for start in range(len(parts)):
        files = whole.get("/".join(parts[start:]), [])
        if files:
            return files[0] if len(files) == 1 else ""
    files = last.get(parts[-1], [])
    return files[0] if len(files) == 1 else ""


def finite(value: object) -> Any:
    """Copy JSON content with None instead of NaN and Infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_integer(value: object) -> int | None:
    """Return an integer that was written as text, as a float or as a truth value; else None."""
    number = int(value) if isinstance(value, bool) else to_numbers(value)
    if is_number(number) and number == int(number) and abs(number) < 2**63:
        return int(number)
    return None


def to_numbers(value: object) -> Any:
    """Replace text that is a finite number by the number, in lists too; the rest stays."""
    if isinstance(value, list):
        return [to_numbers(v) for v in value]
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            return _parsed(value)
        if not math.isfinite(number):
            return value
        return int(number) if number.is_integer() else number
    return value


def _parsed(text: str) -> Any:
    """Return the list or dictionary that text holds (tables keep them so), else the text."""
    plain = text.strip()
    if plain[:1] in ("[", "{") and len(plain) < 10_000_000:
        try:
            value = json.loads(plain)
        except (ValueError, RecursionError):
            return text
        return to_numbers(value) if isinstance(value, list) else value
    numbers = [to_numbers(part) for part in re.split(r"[,;\s]+", plain)] if "," in plain else []
    return numbers if numbers and all_numbers(numbers) else text


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
    polygons = [_near(p, width, height) for p in _unshared(polygons, a, width, height)]
    if not a.get("iscrowd"):
        if masks and isinstance(masks, list) and all(polygon == [] for polygon in masks):
            return []  # some programs write [[]] for "no mask"
        # Where nothing is left, the check names what was there.
        return polygons or None
    if not polygons and all_numbers(a.get("bbox")) and len(a["bbox"]) == 4:
        x, y, w, h = mend_box(a, width, height) or a["bbox"]
        polygons = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    return _run_lengths(polygons, width, height) if polygons else None


def _unshared(
    polygons: list[list[float]], a: Mapping[str, Any], width: int, height: int
) -> list[list[float]]:
    """Return polygons in pixels where they are shares of the image, as their box shows."""
    box = a.get("bbox")
    bounds = bounds_of_polygons(polygons)
    if not bounds or not all_numbers(box) or len(box) != 4:  # type: ignore[arg-type]
        return polygons
    pixels = [[v * (width, height)[i % 2] for i, v in enumerate(p)] for p in polygons]
    wide = bounds_of_polygons(pixels) or bounds
    near = all(abs(p - q) <= 3 for p, q in zip(wide, box, strict=True))  # type: ignore[arg-type]
    return pixels if near and max(max(map(abs, p)) for p in polygons) <= 1 else polygons


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
    if all_numbers(box) and len(box) == 5:  # type: ignore[arg-type]
        return None  # a rotated one
    if all_numbers(box) and len(box) == 4 and not a.get("iscrowd"):  # type: ignore[arg-type]
        witness = bounds_of_polygons(a.get("segmentation"))
        if witness is None and not a.get("segmentation"):
            box = box_by_area(a, width, height)
        elif witness and mask_disagrees({**a, "bbox": box}, {}):
            if not mask_is_right(a, witness, width, height):
                return None  # one of them is wrong, and nothing says which: it is left out
            box = witness
    if not all_numbers(box) or len(box) != 4 or 0 in box[2:]:  # type: ignore[arg-type,index]
        box = _box_of(a.get("segmentation"), width, height)
        if box is None:
            return None
    x, y, w, h = box  # type: ignore[misc]
    if w < 0:
        x, w = x + w, -w
    if h < 0:
        y, h = y + h, -h
    if (
        is_inside([x, y, w, h], width, height)
        or x >= width
        or y >= height
        or x + w <= 0
        or y + h <= 0
    ):
        return [x, y, w, h]  # one that lies wholly outside is left to the check
    x0, y0 = max(x, 0), max(y, 0)
    return [x0, y0, min(x + w, width) - x0, min(y + h, height) - y0]


def _box_of(masks: object, width: int, height: int) -> list[float] | None:
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


Entry = dict[str, Any]

NO_MASK = "it has no mask, as most others do; MODEL.MASK_ON False trains all, as boxes"


def repair_coco(
    data: Mapping[str, Any],
    file: str,
    survey: Mapping[str, ImageFile] | None = None,
    folder: str | PathLike[str] | None = None,
) -> tuple[dict[str, Any], list[Finding]]:
    """Make a COCO dictionary usable.

    Args:
        data: the parsed file; not changed.
        file: its path, for the messages.
        survey: what `survey_images` found, if the images are at hand: images that cannot be read
            are left out, wrong sizes are corrected.
        folder: of the images; files whose names lead nowhere are looked for in it.

    Returns:
        The repaired dictionary, which `load_coco_json` accepts, and what was done.
    """
    done = Findings(file)
    data = _numbered(_listed(data, done), done)
    entries = data.get("images")
    moved = moved_files(entries, folder) if folder and isinstance(entries, list) else {}
    if moved and folder:
        found = survey_images([{"file_name": name} for name in moved.values()], folder)
        survey = {**(survey or {}), **found}
    images = _images(entries, done, survey, moved)
    annotations = _annotations(data.get("annotations"), images, done)
    categories = _categories(data.get("categories"), annotations, done)
    fixed = {
        **finite({k: v for k, v in data.items() if k not in ("images", "categories")}),
        "images": list(images.values()),
        "categories": list(categories.values()),
        "annotations": annotations,
    }
    problems = Findings(file)
    tables = check_coco(fixed, problems, problems, Findings(file))
    for finding in problems.found:
        done.add(finding.where, finding.field, f"left out: {finding.what}")
    fixed["annotations"] = _finish(tables.annotations, images, done)
    return fixed, done.found


def _listed(data: Mapping[str, Any], done: Findings) -> dict[str, Any]:
    """Return the file with lists of images, annotations and categories, as far as they are there.

    A table by id (``{"7": {...}}``) is one; categories that are missing are made from the ids that
    the annotations name.
    """
    data = dict(data)
    for key in ("images", "annotations", "categories"):
        table = data.get(key)
        if isinstance(table, dict) and table and all(isinstance(e, dict) for e in table.values()):
            data[key] = [{"id": name, **entry} for name, entry in table.items()]
            done.add("top level", key, f"a table of {len(table)} by id -> a list")
        elif key in data and not isinstance(table, list):
            done.add("top level", key, f"left out: expected a list, got {short(table)}")
    for image in _list(data.get("images")):
        others = [image[k] for k in NAMES if k in image] if isinstance(image, dict) else []
        if others and "file_name" not in image and isinstance(others[0], str):
            place = data["images"].index(image)
            data["images"][place] = {**image, "file_name": others[0]}
            done.add(f"image {image.get('id')}", "file_name", f"nothing -> {others[0]!r:.60}")
    if not _list(data.get("categories")):
        given = [
            a.get("category_id") for a in _list(data.get("annotations")) if isinstance(a, dict)
        ]
        ids = sorted({n for n in map(to_integer, given) if n is not None and n >= 0})
        data["categories"] = [{"id": number, "name": f"category_{number}"} for number in ids]
        if ids:
            what = f"missing -> {len(ids)} from the annotations, named category_{ids[0]}, ..."
            done.add("top level", "categories", f"{what}; give them their names")
    return data


NAMES = ("filename", "name", "path", "image", "img_path")
"""Keys under which other programs keep the name of an image's file."""


def _numbered(data: Mapping[str, Any], done: Findings) -> Mapping[str, Any]:
    """Number images and categories whose ids are text or negative, wherever they are named."""
    data = dict(data)
    annotations = [dict(a) if isinstance(a, dict) else a for a in _list(data.get("annotations"))]
    for kind, field in (("images", "image_id"), ("categories", "category_id")):
        entries = data.get(kind)
        if not isinstance(entries, list):
            continue
        ids = [e.get("id") for e in entries if isinstance(e, dict)]
        odd: list[int | str] = [i for i in ids if isinstance(i, str) and to_integer(i) is None]
        odd += [i for i in ids if type(i) is int and i < 0]
        if not odd or len(set(map(repr, odd))) < len(odd):
            continue
        fresh = 1 + max((n for n in map(to_integer, ids) if n is not None and n >= 0), default=0)
        new = {value: fresh + place for place, value in enumerate(odd)}
        data[kind] = [
            {**e, "id": new[e["id"]]} if isinstance(e, dict) and _is_in(e.get("id"), new) else e
            for e in entries
        ]
        for a in annotations:
            if isinstance(a, dict) and _is_in(a.get(field), new):
                a[field] = new[a[field]]
        what = f"{len(new)} ids that are text or negative -> {fresh}, {fresh + 1}, ..."
        done.add(kind, "id", f"{what} (in '{field}' of the annotations, too)")
    if isinstance(data.get("annotations"), list):
        data["annotations"] = annotations
    return data


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _is_in(value: object, table: Mapping[Any, int]) -> bool:
    return isinstance(value, (str, int)) and value in table


def _entries(entries: object, kind: str, done: Findings) -> Iterable[tuple[str, Entry]]:
    """Yield (where, copy) of each entry that is an object."""
    for i, entry in enumerate(entries if isinstance(entries, list) else []):
        if isinstance(entry, dict):
            yield f"{kind} {entry.get('id', f'number {i}')}", finite(entry)
        else:
            done.add(f"{kind} number {i}", "entry", "left out: not an object")


def _set(entry: Entry, key: str, value: object, where: str, done: Findings) -> None:
    """Change a field, and tell."""
    before = repr(entry[key]) if key in entry else "nothing"
    done.add(where, key, f"{before:.60} -> {value!r:.60}")
    entry[key] = value


def _integers(entry: Entry, keys: Iterable[str], where: str, done: Findings) -> None:
    for key in keys:
        value = to_integer(entry.get(key))
        if value is not None and not (type(entry[key]) is int and entry[key] == value):
            _set(entry, key, value, where, done)


def _images(
    entries: object,
    done: Findings,
    survey: Mapping[str, ImageFile] | None,
    moved: Mapping[str, str],
) -> dict[int, Entry]:
    table: dict[int, Entry] = {}
    for where, image in _entries(entries, "image", done):
        _integers(image, ("id", "width", "height"), where, done)
        if isinstance(image.get("file_name"), str) and image["file_name"] in moved:
            _set(image, "file_name", moved[image["file_name"]], where, done)
        name = image.get("file_name")
        file = survey.get(name) if survey and isinstance(name, str) else None
        if file is not None and not file.problem:
            if (image.get("width"), image.get("height")) == (file.height, file.width) and (
                file.width != file.height
            ):
                what = "left out: its picture is turned (EXIF), its size and labels are not"
                done.add(
                    where, "width, height", f"{what}; turn the picture's pixels, or the labels"
                )
                continue
            for key, size in (("width", file.width), ("height", file.height)):
                if image.get(key) != size:
                    _set(image, key, size, where, done)
        wrong = [*image_problems(image)]
        outside = None if wrong else path_problem(name, ".")
        if to_integer(image.get("id")) is None or image["id"] in table:
            done.add(where, "id", "left out: used twice, or no integer")
        elif wrong or outside:
            key, what = wrong[0] if wrong else ("file_name", str(outside))
            done.add(where, key, f"left out: {what}")
        elif file is not None and file.problem:
            done.add(where, "file_name", f"left out: {file.problem}")
        else:
            table[image["id"]] = image
    return table


def _categories(entries: object, annotations: list[Entry], done: Findings) -> dict[int, Entry]:
    table: dict[int, Entry] = {}
    for where, category in _entries(entries, "category", done):
        _integers(category, ("id",), where, done)
        if to_integer(category.get("id")) is None or category["id"] in table:
            done.add(where, "id", "left out: used twice, or no integer")
            continue
        taken = {c["name"] for c in table.values()}
        name = category.get("name")
        if not isinstance(name, str) or name in taken:
            prefix = name if isinstance(name, str) else "category"
            _set(category, "name", f"{prefix}_{category['id']}", where, done)
        table[category["id"]] = category
    for number in sorted(roots_of_classes(table.values(), annotations)):
        done.add(f"category {number}", "name", "left out: only the supercategory of others")
        del table[number]
    return table


def _annotations(entries: object, images: Mapping[int, Entry], done: Findings) -> list[Entry]:
    """Mend the fields of each annotation; what remains wrong is found by the check."""
    kept = [*_entries(entries, "annotation", done)]
    known = [to_integer(a.get("id")) for _, a in kept]
    fresh = 1 + max((i for i in known if i is not None), default=0)
    seen: set[int] = set()
    lengths = [len(a["bbox"]) for _, a in kept if isinstance(a.get("bbox"), list)]
    upright = lengths.count(4) >= lengths.count(5)
    for where, a in kept:
        if upright and isinstance(a.get("bbox"), list) and len(a["bbox"]) == 5:
            _set(a, "bbox", None, where, done)  # its mask tells the box, or it is left out
        _integers(a, ("id", "image_id", "category_id"), where, done)
        number = to_integer(a.get("id"))
        if number is None or number < 0 or number in seen:
            _set(a, "id", fresh, where, done)
            fresh += 1
        seen.add(a["id"])
        crowd = to_integer(a.get("iscrowd", 0))
        if type(a.get("iscrowd")) is not int:
            _set(a, "iscrowd", crowd if crowd in (0, 1) else 0, where, done)
        elif crowd not in (0, 1):
            _set(a, "iscrowd", 0, where, done)
        image = images.get(a["image_id"]) if type(a.get("image_id")) is int else None
        _mend(a, image, where, done)
    return [a for _, a in kept]


def _mend(a: Entry, image: Entry | None, where: str, done: Findings) -> None:
    """Mend numbers, mask and box of one annotation."""
    for key in ("bbox", "area", "segmentation", "keypoints"):
        if key in a:
            value = to_numbers(a[key])
            if value != a[key]:
                _set(a, key, value, where, done)
    if "area" in a and not is_number(a["area"]):
        _set(a, "area", 0, where, done)  # computed at the end
    if image is None:
        return
    for key, mend in (("segmentation", mend_segmentation), ("bbox", mend_box)):
        value = mend(a, image["width"], image["height"])
        if value is not None and value != a.get(key):
            _set(a, key, value, where, done)


def _finish(annotations: list[Entry], images: Mapping[int, Entry], done: Findings) -> list[Entry]:
    """Leave out what has no area or, among masks, no mask; correct areas."""
    masks = sum(bool(a.get("segmentation")) for a in annotations)
    boxes_only = 2 * masks < len(annotations)
    kept = []
    shares = within_one(annotations)
    for a in annotations:
        where = f"annotation {a['id']}"
        apart = len(a["bbox"]) == 4 and not a.get("iscrowd") and mask_disagrees(a, {})
        if apart or shares:
            done.add(where, "bbox", f"left out: {apart or SHARES}")
            continue
        if keypoints_apart(a):
            _set(a, "keypoints", [0] * len(a["keypoints"]), where, done)
            a["num_keypoints"] = 0
        if min(a["bbox"][2:4]) <= 0:
            done.add(where, "bbox", f"left out: of size zero, {a['bbox']}")
            continue
        if masks and boxes_only and a.get("segmentation") and not a.get("iscrowd"):
            _set(a, "segmentation", [], where, done)  # most have none: a dataset of boxes
        elif masks and not boxes_only and not a.get("segmentation"):
            done.add(where, "segmentation", f"left out: {NO_MASK}")
            continue
        image = images[a["image_id"]]
        area = true_area(a, image["height"], image["width"])
        if area <= 0:
            done.add(where, "segmentation", "left out: its mask has no pixel")
            continue
        slack = 0.1 * area + sum(a["bbox"][2:4])
        low = area - slack if a.get("segmentation") else 0
        if "area" not in a or not max(low, 1e-9) <= a["area"] <= area + slack:
            _set(a, "area", round(area, 2), where, done)
        kept.append(a)
    return kept
