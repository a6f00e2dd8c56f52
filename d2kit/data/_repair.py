"""Repair of COCO annotations: what can be mended is, what cannot is left out, and each is told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any

from d2kit.data._findings import Finding, Findings, roots_of_classes, true_area
from d2kit.data._image_survey import ImageFile, survey_images
from d2kit.data._repair_fields import (
    finite,
    mend_box,
    mend_segmentation,
    to_integer,
    to_numbers,
)
from d2kit.data._repair_names import moved_files
from d2kit.data.datasets._validate import _image_problems, check_coco, is_number, path_problem

__all__ = ["repair_coco"]

Entry = dict[str, Any]


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


def _entries(entries: Any, kind: str, done: Findings) -> Iterable[tuple[str, Entry]]:
    """Yield (where, copy) of each entry that is an object."""
    for i, entry in enumerate(entries if isinstance(entries, list) else []):
        if isinstance(entry, dict):
            yield f"{kind} {entry.get('id', f'number {i}')}", finite(entry)
        else:
            done.add(f"{kind} number {i}", "entry", "left out: not an object")


def _set(entry: Entry, key: str, value: Any, where: str, done: Findings) -> None:
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
    entries: Any,
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
            for key, size in (("width", file.width), ("height", file.height)):
                if image.get(key) != size:
                    _set(image, key, size, where, done)
        wrong = [*_image_problems(image)]
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


def _categories(entries: Any, annotations: list[Entry], done: Findings) -> dict[int, Entry]:
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


def _annotations(entries: Any, images: Mapping[int, Entry], done: Findings) -> list[Entry]:
    """Mend the fields of each annotation; what remains wrong is found by the check."""
    kept = [*_entries(entries, "annotation", done)]
    known = [to_integer(a.get("id")) for _, a in kept]
    fresh = 1 + max((i for i in known if i is not None), default=0)
    seen: set[int] = set()
    for where, a in kept:
        _integers(a, ("id", "image_id", "category_id"), where, done)
        if to_integer(a.get("id")) is None or a["id"] in seen:
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
    for a in annotations:
        where = f"annotation {a['id']}"
        if min(a["bbox"][2:]) <= 0:
            done.add(where, "bbox", f"left out: of size zero, {a['bbox']}")
            continue
        if masks and boxes_only and a.get("segmentation") and not a.get("iscrowd"):
            _set(a, "segmentation", [], where, done)  # most have none: a dataset of boxes
        elif masks and not boxes_only and not a.get("segmentation"):
            done.add(where, "segmentation", "left out: it has no mask, as most others do")
            continue
        image = images[a["image_id"]]
        area = true_area(a, image["height"], image["width"])
        if area <= 0:
            done.add(where, "segmentation", "left out: its mask has no pixel")
            continue
        slack = 0.1 * area + sum(a["bbox"][2:])
        low = area - slack if a.get("segmentation") else 0
        if "area" not in a or not max(low, 1e-9) <= a["area"] <= area + slack:
            _set(a, "area", round(area, 2), where, done)
        kept.append(a)
    return kept
