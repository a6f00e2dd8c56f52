"""CVAT for images 1.1: one XML file with boxes, polygons and masks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree  # builds only; what is read goes through defusedxml

import numpy as np

from d2kit.curate.conversion.common import (
    CocoBuilder,
    annotations_by_image,
    class_names,
    decode_mask,
    encode_mask,
    polygon_box,
    turn,
    turned_ellipse,
)
from d2kit.curate.conversion.foreign import ImageFinder, check_numbers, check_reach, check_size
from d2kit.data.datasets.pascal_voc import parse_voc_xml
from d2kit.data.datasets.validate import DatasetError, Problems
from d2kit.utils.file_io import atomic_write
from d2kit.utils.text import from_one_line, xml_chars


def read_cvat(
    path: Path, images: Path | None = None, lost: Counter[str] | None = None
) -> dict[str, Any]:
    """Read ``annotations.xml``; polygons of one label and one ``group_id`` are one object.

    Ellipses and turned boxes become polygons; attributes are kept as the field `attributes`.

    Args:
        path: the file, or the folder that holds it.
        images: image folder that names are relative to, by default that of the file.
        lost: counts tags, points, lines and other shapes that COCO's objects cannot be.
    """
    file = path / "annotations.xml" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"'{file}' does not exist; expected an export of CVAT")
    problems = Problems(str(file))
    root = parse_voc_xml(str(file), problems)
    problems.raise_if_any()
    elements = root.findall("image")
    if root.find("track") is not None or not elements:
        kind = "tracks" if root.find("track") is not None else f"<{root.tag}> without <image>"
        what = f"expected 'CVAT for images 1.1', got {kind}; export the task again in that format"
        raise DatasetError(f"{file}: top level: {what}")
    names = [
        from_one_line(e.text.strip()) for e in root.findall("meta//labels/label/name") if e.text
    ]
    builder = CocoBuilder(file, None, lost, ImageFinder(images or file.parent))
    for element in elements:
        where = f"{file}: image {element.get('id')}"
        width, height = check_size(element.get("width", ""), element.get("height", ""), where)
        image_id = builder.image(element.get("name", ""), width, height)
        groups: dict[tuple[str, str], dict[str, Any]] = {}
        for number, shape in enumerate(element):
            _read_shape(builder, shape, image_id, (width, height), groups, f"{where}, {number}")
    # The header also lists labels of tags, and those that nobody used.
    used = {name for name, _ in builder.found}
    builder.names = [name for name in dict.fromkeys(names) if name in used]
    return builder.finish()


def _read_shape(
    builder: CocoBuilder,
    shape: Any,
    image_id: int,
    size: tuple[int, int],
    groups: dict[tuple[str, str], dict[str, Any]],
    where: str,
) -> None:
    label, group = from_one_line(shape.get("label", "")), shape.get("group_id", "0")
    where = f"{where}: {shape.tag}"
    if shape.tag in ("box", "ellipse"):
        builder.add(image_id, label, _box_or_ellipse(shape, where), where, **_extra(shape))
    elif shape.tag == "polygon":
        points = check_numbers(shape.get("points", "").replace(";", ",").split(","), where)
        if len(points) < 6 or len(points) % 2:
            raise DatasetError(f"{where}: points: expected at least 3, got {len(points) / 2:g}")
        if (label, group) in groups:
            check_reach(points, *size, where)
            entry = groups[label, group]
            entry["segmentation"].append(points)
            entry["bbox"] = polygon_box(entry["segmentation"])
            return
        builder.add(image_id, label, [points], where, **_extra(shape))
        if group != "0":
            groups[label, group] = builder.found[-1][1]
    elif shape.tag == "mask":
        builder.add(image_id, label, _read_mask(shape, size, where), where, **_extra(shape))
    else:
        builder.lost[f"shapes of type {shape.tag}"] += 1


def _extra(shape: Any) -> dict[str, Any]:
    """Return `iscrowd` and, where there are any, `attributes`."""
    found = {e.get("name", ""): e.text or "" for e in shape.findall("attribute")}
    crowd = int(found.pop("iscrowd", "0") == "1")
    if shape.get("occluded") == "1":
        found["occluded"] = "1"
    return {"iscrowd": crowd, **({"attributes": found} if found else {})}


def _box_or_ellipse(shape: Any, where: str) -> list[Any]:
    """Return a box as it is; one that is turned, and an ellipse, as a polygon."""
    keys = ("xtl", "ytl", "xbr", "ybr") if shape.tag == "box" else ("cx", "cy", "rx", "ry")
    texts = [*(shape.get(k, "") for k in keys), shape.get("rotation", "0")]
    x0, y0, x1, y1, degrees = check_numbers(texts, where)
    if shape.tag == "ellipse":
        return [turned_ellipse(x0, y0, x1, y1, degrees)]
    if not degrees % 360:
        return [x0, y0, x1 - x0, y1 - y0]
    corners = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
    return [turn(corners, degrees).ravel().tolist()]


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
    lost: Counter[str] = Counter()
    names, of_image = class_names(coco), annotations_by_image(coco, lost)
    root = ElementTree.Element("annotations")
    ElementTree.SubElement(root, "version").text = "1.1"
    task = ElementTree.SubElement(ElementTree.SubElement(root, "meta"), "task")
    labels = ElementTree.SubElement(task, "labels")
    for name in names.values():
        label = ElementTree.SubElement(labels, "label")
        ElementTree.SubElement(label, "name").text = xml_chars(name)
    for number, image in enumerate(coco["images"]):
        keys = {"name": image["file_name"], "width": image["width"], "height": image["height"]}
        element = _element(root, "image", {"id": number, **keys})
        for a in of_image[image["id"]]:
            _write_shape(element, a, names[a["category_id"]], image)
    ElementTree.indent(root)
    with atomic_write(path) as file:
        file.write(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True))
    return +lost


def _element(parent: Any, tag: str, keys: Mapping[str, Any]) -> Any:
    return ElementTree.SubElement(parent, tag, {k: xml_chars(v) for k, v in keys.items()})


def _write_shape(parent: Any, a: Mapping[str, Any], label: str, image: Mapping[str, Any]) -> None:
    attributes = dict(a.get("attributes") or {})
    common = {"label": label, "occluded": int(attributes.pop("occluded", 0)), "z_order": 0}
    if a.get("iscrowd"):
        attributes["iscrowd"] = 1
    elements = []
    masks = a.get("segmentation")
    if isinstance(masks, dict):
        mask = decode_mask(masks, image["height"], image["width"])
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        part = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        edges = np.flatnonzero(np.diff(part.ravel(), prepend=False))
        runs = np.diff([0, *edges, part.size]).tolist()
        box = {"left": columns[0], "top": rows[0], "width": part.shape[1], "height": part.shape[0]}
        rle = ", ".join(map(str, runs))
        elements.append(_element(parent, "mask", {**common, **box, "rle": rle}))
    elif masks:
        group = {"group_id": a["id"]} if len(masks) > 1 else {}
        for polygon in masks:
            pairs = zip(polygon[::2], polygon[1::2], strict=True)
            points = ";".join(f"{x},{y}" for x, y in pairs)
            elements.append(_element(parent, "polygon", {**common, **group, "points": points}))
    else:
        x, y, w, h = a["bbox"]
        sides = {"xtl": x, "ytl": y, "xbr": x + w, "ybr": y + h}
        elements.append(_element(parent, "box", {**common, **sides}))
    for element in elements:
        for name, value in attributes.items():
            _element(element, "attribute", {"name": name}).text = xml_chars(value)
