"""Pascal VOC: one XML file per image, boxes only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree  # builds only; what is read goes through defusedxml

from d2kit.curate.conversion.common import (
    CocoBuilder,
    annotations_by_image,
    class_names,
    files_below,
    side_files,
)
from d2kit.curate.conversion.foreign import ImageFinder, image_root, read_text
from d2kit.data.datasets.pascal_voc import parse_voc_xml, read_voc_annotation
from d2kit.data.datasets.validate import Problems
from d2kit.utils.file_io import atomic_write
from d2kit.utils.text import from_one_line, one_line, xml_chars


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
        _read_file(builder, file, folder)
    return builder.finish()


def _read_file(builder: CocoBuilder, file: Path, folder: Path) -> None:
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
            _object(root, a, names[a["category_id"]], image)
        ElementTree.indent(root)
        with atomic_write(files[image["id"]]) as file:
            file.write(ElementTree.tostring(root, encoding="utf-8"))
    with atomic_write(path / "labels.txt", "w") as file:
        file.write("".join(f"{one_line(name, None)}\n" for name in names.values()))
    return +lost


def _object(
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


def _text(parent: ElementTree.Element, key: str, value: Any) -> None:
    ElementTree.SubElement(parent, key).text = xml_chars(value)
