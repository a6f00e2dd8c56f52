"""CVAT for images 1.1: one XML file with boxes, polygons and masks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree  # builds only; what is read goes through defusedxml

import numpy as np

from d2kit.data.conversion._common import (
    CocoBuilder,
    annotations_by_image,
    check_numbers,
    class_names,
    decode_mask,
    encode_mask,
    polygon_box,
)
from d2kit.data.datasets._validate import DatasetError, Problems
from d2kit.data.datasets.pascal_voc import _parse
from d2kit.utils.file_io import atomic_write


def read_cvat(path: Path, images: Path | None = None) -> dict[str, Any]:
    """Read ``annotations.xml``; polygons of one label and one ``group_id`` are one object.

    Args:
        path: the file, or the folder that holds it.
        images: not used.
    """
    file = path / "annotations.xml" if path.is_dir() else path
    problems = Problems(str(file))
    root = _parse(str(file), problems)
    problems.raise_if_any()
    names = [e.text.strip() for e in root.findall("meta//labels/label/name") if e.text]
    builder = CocoBuilder(file, list(dict.fromkeys(names)))
    for element in root.findall("image"):
        where = f"{file}: image {element.get('id')}"
        size = check_numbers([element.get("width", ""), element.get("height", "")], where)
        width, height = int(size[0]), int(size[1])
        image_id = builder.image(element.get("name", ""), width, height)
        groups: dict[tuple[str, str], dict[str, Any]] = {}
        for number, shape in enumerate(element):
            _read_shape(builder, shape, image_id, (width, height), groups, f"{where}, {number}")
    return builder.finish()


def _read_shape(
    builder: CocoBuilder,
    shape: Any,
    image_id: int,
    size: tuple[int, int],
    groups: dict[tuple[str, str], dict[str, Any]],
    where: str,
) -> None:
    label, group = shape.get("label", ""), shape.get("group_id")
    crowd = any(e.get("name") == "iscrowd" and e.text == "1" for e in shape.findall("attribute"))
    where = f"{where}: {shape.tag}"
    if shape.tag == "box":
        x0, y0, x1, y1 = check_numbers(
            [shape.get(k, "") for k in ("xtl", "ytl", "xbr", "ybr")], where
        )
        builder.add(image_id, label, [x0, y0, x1 - x0, y1 - y0])
    elif shape.tag == "polygon":
        points = check_numbers(shape.get("points", "").replace(";", ",").split(","), where)
        if len(points) < 6 or len(points) % 2:
            raise DatasetError(f"{where}: points: expected at least 3, got {len(points) / 2:g}")
        if group and (label, group) in groups:
            entry = groups[label, group]
            entry["segmentation"].append(points)
            entry["bbox"] = polygon_box(entry["segmentation"])
            return
        builder.add(image_id, label, [points])
        if group:
            groups[label, group] = builder.found[-1][1]
    elif shape.tag == "mask":
        builder.add(image_id, label, _read_mask(shape, size, where), iscrowd=int(crowd))
    elif shape.tag not in ("tag", "attribute"):
        what = "expected box, polygon or mask; convert it in CVAT, or delete it"
        builder.problems.add(where, "shape", what)


def _read_mask(shape: Any, size: tuple[int, int], where: str) -> dict[str, Any]:
    """Return the mask of row-wise runs within a box, background first."""
    corner = check_numbers([shape.get(k, "") for k in ("left", "top", "width", "height")], where)
    x, y, w, h = (int(v) for v in corner)
    runs = np.array(check_numbers(shape.get("rle", "").split(","), where))
    fits = min(x, y) >= 0 and min(w, h) > 0 and x + w <= size[0] and y + h <= size[1]
    if not fits or runs.min() < 0 or runs.sum() != w * h:
        raise DatasetError(f"{where}: rle: {runs.sum():g} pixels in a box of {w} x {h} at {x}, {y}")
    values = np.repeat(np.arange(len(runs)) % 2, runs.astype(int))
    mask = np.zeros((size[1], size[0]), bool)
    mask[y : y + h, x : x + w] = values.reshape(h, w)
    return encode_mask(mask)


def write_cvat(coco: Mapping[str, Any], path: Path) -> Counter[str]:
    """Write the XML file `path` (``annotations.xml`` in it, where it has no ending)."""
    path = path if path.suffix == ".xml" else path / "annotations.xml"
    path.parent.mkdir(parents=True, exist_ok=True)
    names, of_image = class_names(coco), annotations_by_image(coco)
    root = ElementTree.Element("annotations")
    ElementTree.SubElement(root, "version").text = "1.1"
    task = ElementTree.SubElement(ElementTree.SubElement(root, "meta"), "task")
    labels = ElementTree.SubElement(task, "labels")
    for name in names.values():
        ElementTree.SubElement(ElementTree.SubElement(labels, "label"), "name").text = name
    for number, image in enumerate(coco["images"]):
        keys = {"name": image["file_name"], "width": image["width"], "height": image["height"]}
        element = _element(root, "image", {"id": number, **keys})
        for a in of_image[image["id"]]:
            _write_shape(element, a, names[a["category_id"]], image)
    ElementTree.indent(root)
    with atomic_write(path) as file:
        file.write(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True))
    return Counter()


def _element(parent: Any, tag: str, keys: Mapping[str, Any]) -> Any:
    return ElementTree.SubElement(parent, tag, {k: str(v) for k, v in keys.items()})


def _write_shape(parent: Any, a: Mapping[str, Any], label: str, image: Mapping[str, Any]) -> None:
    common = {"label": label, "occluded": 0, "z_order": 0}
    masks = a.get("segmentation")
    if isinstance(masks, dict):
        mask = decode_mask(masks, image["height"], image["width"])
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if not len(rows):
            return
        part = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        edges = np.flatnonzero(np.diff(part.ravel(), prepend=False))
        runs = np.diff([0, *edges, part.size]).tolist()
        box = {"left": columns[0], "top": rows[0], "width": part.shape[1], "height": part.shape[0]}
        rle = ", ".join(map(str, runs))
        element = _element(parent, "mask", {**common, **box, "rle": rle})
        if a.get("iscrowd"):
            _element(element, "attribute", {"name": "iscrowd"}).text = "1"
    elif masks:
        group = {"group_id": a["id"]} if len(masks) > 1 else {}
        for polygon in masks:
            pairs = zip(polygon[::2], polygon[1::2], strict=True)
            points = ";".join(f"{x:.2f},{y:.2f}" for x, y in pairs)
            _element(parent, "polygon", {**common, **group, "points": points})
    else:
        x, y, w, h = a["bbox"]
        sides = {"xtl": x, "ytl": y, "xbr": x + w, "ybr": y + h}
        _element(parent, "box", {**common, **{k: f"{v:.2f}" for k, v in sides.items()}})
