"""What is wrong with a dataset in COCO format: its annotations and its image files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike, fspath
from typing import Any

from d2kit.curate.findings import (
    SHARES,
    Finding,
    Findings,
    ImageFile,
    keypoints_apart,
    mask_disagrees,
    reaches_far,
    roots_of_classes,
    survey_images,
    true_area,
    within_one,
)
from d2kit.curate.repair import repair_coco
from d2kit.data.datasets.validate import (
    CocoTables,
    check_coco,
    is_number,
    path_problem,
    read_json,
)

__all__ = ["Finding", "ImageFile", "check_dataset", "repair_coco", "survey_images"]

OWN_RULES = {
    "bbox_out_of_bounds",
    "degenerate_bbox",
    "zero_area",
    "zero_dimensions",
    "near_duplicate_check_skipped",
    "zero_instance_category",
    "low_instance_category",
}
"""Codes of hotcoco's health check that our own rules report with more detail."""

HEALTH_KEYS = ("id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation")

FEW = 10
"""Instances of a class below which there is little to learn from, or to measure."""

MAX_NOTES = 20
"""Notes of one kind that are listed one by one."""


def check_dataset(
    json_file: str | PathLike[str],
    images: str | PathLike[str] | None = None,
    *,
    survey: Mapping[str, ImageFile] | None = None,
) -> list[Finding]:
    """Check a COCO JSON file, and its images where their folder is given.

    Args:
        json_file: the annotations.
        images: folder that the `file_name`s are relative to; every image is decoded.
        survey: what `survey_images` found before, to decode nothing twice.

    Returns:
        Findings; those of level "error" stop or falsify training or AP, a "note" can be intended.

    Raises:
        FileNotFoundError: there is no such file.
        DatasetError: it is no JSON object.
    """
    file = fspath(json_file)
    data = read_json(file, file)
    found = Findings(file)
    tables = check_coco(data, found, found, found)
    for image_id, image in tables.images.items():
        if isinstance(image.get("file_name"), str):
            what = path_problem(image["file_name"], fspath(images or "."))
            if what:
                found.add(f"image {image_id}", "file_name", what)
    _check_annotations(tables, found)
    _check_whole(tables, found)
    _health(tables, found)
    if images is not None:
        files = survey_images(tables.images.values(), images) if survey is None else survey
        _check_images(tables, files, found)
    return found.found


def _check_annotations(tables: CocoTables, found: Findings) -> None:
    """Find what can be loaded, but gives wrong training or AP."""
    has_masks = any(a.get("segmentation") for a in tables.annotations)
    for a in tables.annotations:
        for key, what in _annotation_problems(a, tables.images[a["image_id"]], has_masks):
            found.add(f"annotation {a['id']}", key, what)


def _annotation_problems(
    a: Mapping[str, Any], image: Mapping[str, Any], has_masks: bool
) -> Iterator[tuple[str, str]]:
    width, height = a["bbox"][2:4]
    if min(width, height) == 0:
        yield "bbox", f"of size zero: {a['bbox']}; nothing can be learned from it"
    elif len(a["bbox"]) == 4 and a.get("segmentation") and not a.get("iscrowd"):
        apart = mask_disagrees(a, image)
        if apart:
            yield "bbox", apart
    far = keypoints_apart(a)
    if far:
        yield "keypoints", far
    if "iscrowd" not in a:
        yield "iscrowd", "missing; expected 0 or 1"
    if has_masks and not a.get("segmentation"):
        yield "segmentation", "missing, while other annotations of the file have masks"
    if not is_number(a.get("area")):
        yield "area", "missing; expected pixels; AP of small and large objects needs it"
        return
    size: Any = (image.get("height"), image.get("width"))
    if a.get("segmentation") and not all(type(s) is int and 0 < s < 2**31 for s in size):
        return
    masks = a.get("segmentation")
    if isinstance(masks, list) and any(reaches_far(p, size[1], size[0]) for p in masks):
        yield "segmentation", f"reaches far beyond its image of {size[1]} x {size[0]} pixels"
        return
    truth = true_area(a, *size)
    slack = 0.1 * truth + width + height  # rasterisation moves the outline by up to a pixel
    # Without masks, the area may be that of a mask which was left out: smaller than the box.
    low = truth - slack if a.get("segmentation") else 0
    if not max(low, 1e-9 if truth else 0) <= a["area"] <= truth + slack:
        kind = "mask" if a.get("segmentation") else "box"
        yield "area", f"{a['area']} pixels, but its {kind} has {truth:.1f}"


def _check_whole(tables: CocoTables, found: Findings) -> None:
    """Find what concerns no single annotation."""
    if not tables.images:
        found.add("top level", "images", "the dataset is empty: it holds no usable image")
    elif not any(a.get("iscrowd", 0) == 0 for a in tables.annotations):
        what = "only crowds" if tables.annotations else "no usable annotation"
        found.add("top level", "annotations", f"{what}: nothing can be trained on this dataset")
    if within_one(tables.annotations):
        found.add("top level", "annotations", SHARES)
    lengths = Counter(len(a["bbox"]) for a in tables.annotations)
    for a in tables.annotations if lengths[4] >= lengths[5] > 0 else ():
        if len(a["bbox"]) == 5:
            what = f"a rotated box (5 numbers) among {lengths[4]} upright ones: {a['bbox']}"
            found.add(f"annotation {a['id']}", "bbox", what)
    counts = Counter(a["category_id"] for a in tables.annotations)
    roots = roots_of_classes(tables.categories.values(), tables.annotations)
    for number, category in tables.categories.items():
        what = f"'{category.get('name')}' has {counts[number]} instances"
        if number in roots:
            what += "; it is but the supercategory of others; --fix leaves it out"
        if counts[number] < FEW:
            found.note(f"category {number}", "annotations", what)
    for kind, table, key in (
        ("image", tables.images, "file_name"),
        ("category", tables.categories, "name"),
    ):
        first: dict[Any, Any] = {}
        for number, entry in table.items():
            name = entry.get(key)
            if isinstance(name, str) and first.setdefault(name, number) != number:
                found.add(f"{kind} {number}", key, f"'{name}' is also {kind} {first[name]}")


def _health(tables: CocoTables, found: Findings) -> None:
    """Add what hotcoco's health check finds beyond our rules, as notes."""
    import hotcoco

    usable = {
        i: im
        for i, im in tables.images.items()
        if all(type(im.get(k)) is int and 0 < im[k] < 2**31 for k in ("width", "height"))
        and isinstance(im.get("file_name"), str)
    }
    if any(len(a["bbox"]) != 4 for a in tables.annotations):
        return  # its rules are those of upright boxes
    coco = {
        "images": _only(usable.values(), ("id", "file_name", "width", "height")),
        "categories": _only(tables.categories.values(), ("id", "name")),
        "annotations": _only(
            (a for a in tables.annotations if a["image_id"] in usable), HEALTH_KEYS
        ),
    }
    try:
        report = hotcoco.COCO(coco).healthcheck()
    except ValueError as error:
        found.add("top level", "health check", f"COCO's evaluation will refuse the file: {error}")
        return
    for entry in [*report["errors"], *report["warnings"]]:
        if entry["code"] in OWN_RULES:
            continue
        ids = sorted(entry["affected_ids"])
        for number in ids[:MAX_NOTES]:
            found.note(f"annotation {number}", entry["code"], entry["message"])
        if len(ids) > MAX_NOTES:
            found.note("annotations", entry["code"], f"... and {len(ids) - MAX_NOTES} more")


def _only(entries: Iterable[Mapping[str, Any]], keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """Copy the given keys, where they are set; further ones are the user's own."""
    return [{k: e[k] for k in keys if e.get(k) is not None} for e in entries]


def _check_images(tables: CocoTables, files: Mapping[str, ImageFile], found: Findings) -> None:
    """Compare the entries of "images" with the files."""
    for image_id, image in tables.images.items():
        file = files.get(image.get("file_name"))  # type: ignore[arg-type]
        if file is None:
            continue
        where = f"image {image_id}"
        if file.problem:
            found.add(where, "file_name", file.problem)
            continue
        size = (image.get("width"), image.get("height"))
        if size != (file.width, file.height):
            what = f"says {size[0]} x {size[1]} pixels, {file.path} has"
            found.add(where, "width, height", f"{what} {file.width} x {file.height}")
        if file.note:
            found.note(where, "file_name", f"{file.path}: {file.note}")
