"""Formats in XML: CVAT for images 1.1 and Pascal VOC."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree  # builds only; what is read goes through defusedxml

import numpy as np

from d2kit.curate.conversion.common import (
    CocoBuilder,
    annotations_by_image,
    class_names,
    decode_mask,
    encode_mask,
    files_below,
    polygon_box,
    side_files,
    turn,
    turned_ellipse,
)
from d2kit.curate.conversion.foreign import (
    ImageFinder,
    check_numbers,
    check_reach,
    check_size,
    image_root,
    read_text,
)
from d2kit.data.datasets.pascal_voc import parse_voc_xml, read_voc_annotation
from d2kit.data.datasets.validate import DatasetError, Problems
from d2kit.utils.file_io import atomic_write
from d2kit.utils.text import from_one_line, one_line, xml_chars


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
            _read_cvat_shape(
                builder, shape, image_id, (width, height), groups, f"{where}, {number}"
            )
    # The header also lists labels of tags, and those that nobody used.
    used = {name for name, _ in builder.found}
    builder.names = [name for name in dict.fromkeys(names) if name in used]
    return builder.finish()


def _read_cvat_shape(
    builder: CocoBuilder,
    shape: ElementTree.Element,
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


def _extra(shape: ElementTree.Element) -> dict[str, Any]:
    """Return `iscrowd` and, where there are any, `attributes`."""
    found = {e.get("name", ""): e.text or "" for e in shape.findall("attribute")}
    crowd = int(found.pop("iscrowd", "0") == "1")
    if shape.get("occluded") == "1":
        found["occluded"] = "1"
    return {"iscrowd": crowd, **({"attributes": found} if found else {})}


def _box_or_ellipse(shape: ElementTree.Element, where: str) -> list[Any]:
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


def _read_mask(shape: ElementTree.Element, size: tuple[int, int], where: str) -> dict[str, Any]:
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


CVAT_MARK = b"made by d2kit convert"
"""In the files that `write_cvat` wrote, and that may be written again."""


def write_cvat(coco: Mapping[str, Any], path: Path) -> Counter[str]:
    """Write the XML file `path` (``annotations.xml`` in it, where it has no ending)."""
    path = path if path.suffix == ".xml" else path / "annotations.xml"
    path.parent.mkdir(parents=True, exist_ok=True)
    lost: Counter[str] = Counter()
    names, of_image = class_names(coco), annotations_by_image(coco, lost)
    root = ElementTree.Element("annotations")
    root.append(ElementTree.Comment(f" {CVAT_MARK.decode()} "))
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
            _write_cvat_shape(element, a, names[a["category_id"]], image)
    ElementTree.indent(root)
    with atomic_write(path) as file:
        file.write(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True))
    return +lost


def _element(parent: ElementTree.Element, tag: str, keys: Mapping[str, Any]) -> ElementTree.Element:
    return ElementTree.SubElement(parent, tag, {k: xml_chars(v) for k, v in keys.items()})


def _write_cvat_shape(
    parent: ElementTree.Element, a: Mapping[str, Any], label: str, image: Mapping[str, Any]
) -> None:
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


def read_voc(
    path: Path, images: Path | None = None, lost: Counter[str] | None = None
) -> dict[str, Any]:
    """Read a folder with ``Annotations/*.xml`` (or the files themselves) and maybe ``labels.txt``.

    Args:
        path: the folder.
        images: image folder that names are relative to, by default ``JPEGImages`` or ``images``
            in `path`, in capitals or not, else `path`.
        lost: counts images whose file was not found.
    """
    inside = {p.name.lower(): p for p in path.iterdir()} if path.is_dir() else {}
    folder = inside.get("annotations", path)
    listed = path / "labels.txt"
    lines = None
    if listed.is_file():
        lines = [from_one_line(line) for line in read_text(listed).splitlines()]
    finder = ImageFinder(images or image_root(path))
    builder = CocoBuilder(path, lines, lost, finder)
    for file in files_below(folder if folder.is_dir() else path, ".xml"):
        _read_voc_file(builder, file, folder)
    return builder.finish()


def _read_voc_file(builder: CocoBuilder, file: Path, folder: Path) -> None:
    height, width, objects = read_voc_annotation(str(file))
    given = parse_voc_xml(str(file), Problems(str(file))).findtext("filename") or f"{file.stem}.jpg"
    name = given.strip().replace("\\", "/")
    if "/" not in name:  # most tools write the last part only
        name = (file.relative_to(folder).parent / name).as_posix()
    finder = builder.finder
    if finder is not None and finder.find(name, file.parent) is None:
        # Images were renamed after they were annotated.
        name = finder.find(file.relative_to(folder).as_posix(), file.parent) or name
    image_id = builder.image(name, width, height, file.parent)
    for number, found in enumerate(objects):
        x0, y0, x1, y1 = (max(v, 0) for v in found.box)  # some programs count from 0
        extra = {"difficult": 1} if found.difficult else {}
        where = f"{file}: object number {number}"
        builder.add(image_id, from_one_line(found.name), [x0, y0, x1 - x0, y1 - y0], where, **extra)


def write_voc(coco: Mapping[str, Any], path: Path) -> Counter[str]:
    """Write ``Annotations/<image>.xml`` and ``labels.txt``; coordinates become whole pixels."""
    lost: Counter[str] = Counter()
    names, of_image = class_names(coco), annotations_by_image(coco, lost)
    files = side_files(coco, path / "Annotations", ".xml")
    for image in coco["images"]:
        root = ElementTree.Element("annotation")
        _text(root, "folder", PurePosixPath(image["file_name"]).parent.as_posix())
        _text(root, "filename", image["file_name"])
        size = ElementTree.SubElement(root, "size")
        for key, value in (("width", image["width"]), ("height", image["height"]), ("depth", 3)):
            _text(size, key, value)
        for a in of_image[image["id"]]:
            lost["masks (VOC holds boxes)"] += bool(a.get("segmentation"))
            lost["crowds (written as difficult)"] += bool(a.get("iscrowd"))
            _voc_object(root, a, names[a["category_id"]], image)
        ElementTree.indent(root)
        with atomic_write(files[image["id"]]) as file:
            file.write(ElementTree.tostring(root, encoding="utf-8"))
    with atomic_write(path / "labels.txt", "w") as file:
        file.write("".join(f"{one_line(name, None)}\n" for name in names.values()))
    return +lost


def _voc_object(
    root: ElementTree.Element, a: Mapping[str, Any], name: str, image: Mapping[str, Any]
) -> None:
    element = ElementTree.SubElement(root, "object")
    _text(element, "name", name)
    _text(element, "difficult", int(bool(a.get("iscrowd") or a.get("difficult"))))
    x, y, w, h = a["bbox"]
    box = ElementTree.SubElement(element, "bndbox")
    # Pixels are counted from 1 and both ends are included; every box keeps one of its image.
    low = [min(max(round(v), 0), image[k] - 1) for v, k in ((x, "width"), (y, "height"))]
    high = [
        min(max(round(v), first + 1), image[k])
        for v, first, k in ((x + w, low[0], "width"), (y + h, low[1], "height"))
    ]
    sides = {"xmin": low[0] + 1, "ymin": low[1] + 1, "xmax": high[0], "ymax": high[1]}
    for key, value in sides.items():
        _text(box, key, value)


def _text(parent: ElementTree.Element, key: str, value: object) -> None:
    ElementTree.SubElement(parent, key).text = xml_chars(value)
