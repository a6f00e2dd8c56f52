"""Pascal VOC: reading its XML annotations, and registering its splits.

Source: Everingham et al., "The Pascal Visual Object Classes (VOC) Challenge", 2010; the layout is
that of the published archives.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2kit.data.catalog import DatasetCatalog, MetadataCatalog
from d2kit.data.datasets.validate import Problems, short
from d2kit.structures import BoxMode
from d2kit.utils.file_io import PathManager
from d2kit.utils.names import nearest_names

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

__all__ = [
    "CLASS_NAMES",
    "VocObject",
    "load_voc_instances",
    "read_voc_annotation",
    "read_voc_split",
    "register_pascal_voc",
]

CLASS_NAMES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)
"""The 20 classes, in alphabetical order."""

_SIDES = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True)
class VocObject:
    """One object of an annotation file.

    Args:
        name: its class.
        box: XYXY in continuous coordinates: the file counts pixels from 1 and includes the last.
        difficult: whether evaluation leaves it out.
    """

    name: str
    box: tuple[float, float, float, float]
    difficult: bool


def read_voc_split(dirname: str, split: str) -> list[str]:
    """Return the image ids of a split, in the order of its file.

    Args:
        dirname: for example "datasets/VOC2007".
        split: "train", "val", "trainval" or "test".

    Raises:
        FileNotFoundError: there is no such list.
        DatasetError: an id is no plain file name.
    """
    path = os.path.join(dirname, "ImageSets", "Main", f"{split}.txt")
    problems = Problems(path)
    ids = []
    for number, line in enumerate(_read(path).decode("utf-8", "replace").splitlines(), start=1):
        if not line.strip():
            continue
        name = line.split()[0]
        if "/" in name or "\\" in name or "\0" in name or name in (".", ".."):
            problems.add(f"line {number}", "image id", f"expected a file name, got '{name:.60}'")
        ids.append(name)
    problems.raise_if_any()
    return ids


def _read(path: str) -> bytes:
    local = PathManager.get_local_path(path)
    if not os.path.isfile(local):
        raise FileNotFoundError(
            f"'{path}' does not exist; expected is the layout of the VOC archives: ImageSets/Main, "
            "Annotations and JPEGImages (see datasets/README.md)"
        )
    return Path(local).read_bytes()


def read_voc_annotation(path: str) -> tuple[int, int, list[VocObject]]:
    """Read one annotation file; entities and document types are refused.

    Args:
        path: ``Annotations/<id>.xml``.

    Returns:
        (height, width, objects) in pixels.

    Raises:
        FileNotFoundError: there is no such file.
        DatasetError: no XML, or one line for each wrong field.
    """
    problems = Problems(path)
    root = parse_voc_xml(path, problems)
    problems.raise_if_any()
    height, width = (
        _number(root, f"size/{side}", "size", problems) for side in ("height", "width")
    )
    objects = [
        _object(element, f"object number {i}", problems)
        for i, element in enumerate(root.findall("object"))
    ]
    if not (height > 0 and width > 0):
        problems.add("size", "height, width", f"expected pixels > 0, got {height:g}, {width:g}")
    problems.raise_if_any()
    return int(height), int(width), objects


def parse_voc_xml(path: str, problems: Problems) -> Any:
    """Return the root of an XML file; None, with a line in `problems`, where it is none."""
    from xml.etree.ElementTree import ParseError

    from defusedxml import DefusedXmlException
    from defusedxml.ElementTree import fromstring

    try:
        return fromstring(_read(path), forbid_dtd=True)
    except DefusedXmlException as error:
        problems.add("XML", "document type", f"refused: {type(error).__name__}; remove it")
    except (ParseError, ValueError, LookupError, RecursionError) as error:
        problems.add("XML", "syntax", f"not valid ({error}); is the file complete?")
    return None


def _number(element: Element, field: str, where: str, problems: Problems) -> float:
    text = element.findtext(field)
    try:
        value = float(text or "")
        if isfinite(value):
            return value
    except (TypeError, ValueError):
        pass
    problems.add(
        where, field, f"expected a number, got {'nothing' if text is None else short(text)}"
    )
    return 1.0


def _object(element: Element, where: str, problems: Problems) -> VocObject:
    name = (element.findtext("name") or "").strip()
    if not name:
        problems.add(where, "name", "expected a class, got nothing")
    box = element.find("bndbox")
    if box is None:
        problems.add(where, "bndbox", "missing")
        return VocObject(name, (0, 0, 0, 0), False)
    x0, y0, x1, y1 = (_number(box, side, where, problems) for side in _SIDES)
    if x1 < x0 or y1 < y0:
        problems.add(
            where, "bndbox", f"expected xmin <= xmax, ymin <= ymax, got {[x0, y0, x1, y1]}"
        )
    difficult = element.findtext("difficult")
    marked = difficult is not None and _number(element, "difficult", where, problems) != 0
    # Pixels are counted from 1 and both ends are included: [1, 1] is [0, 1] in the continuum.
    return VocObject(name, (x0 - 1, y0 - 1, x1, y1), marked)


def load_voc_instances(
    dirname: str, split: str, class_names: list[str] | tuple[str, ...]
) -> list[dict[str, Any]]:
    """Load a split of Pascal VOC.

    Args:
        dirname: folder with ``Annotations``, ``ImageSets`` and ``JPEGImages``.
        split: "train", "val", "trainval" or "test".
        class_names: the classes, in the order of their indices.

    Returns:
        One record per image: `file_name`, `image_id` (text), `height`, `width` and `annotations`
        with `category_id`, `bbox` (XYXY_ABS, continuous) and `bbox_mode`; difficult objects too.

    Raises:
        FileNotFoundError: the list of the split or an annotation file does not exist.
        DatasetError: see `read_voc_annotation`; an unknown class.
    """
    index = {name: i for i, name in enumerate(class_names)}
    problems = Problems(os.path.join(dirname, "Annotations"))
    records = []
    for image_id in read_voc_split(dirname, split):
        path = os.path.join(dirname, "Annotations", f"{image_id}.xml")
        height, width, objects = read_voc_annotation(path)
        for number, found in enumerate(objects):
            if found.name not in index:
                near = ", ".join(nearest_names(found.name, index)) or "none"
                what = f"unknown class {short(found.name)}; nearest: {near}"
                problems.add(f"{image_id}.xml object number {number}", "name", what)
        records.append(
            {
                "file_name": os.path.join(dirname, "JPEGImages", f"{image_id}.jpg"),
                "image_id": image_id,
                "height": height,
                "width": width,
                "annotations": [
                    {
                        "category_id": index.get(found.name, -1),
                        "bbox": list(found.box),
                        "bbox_mode": BoxMode.XYXY_ABS,
                    }
                    for found in objects
                ],
            }
        )
    problems.raise_if_any()
    return records


def register_pascal_voc(
    name: str,
    dirname: str,
    split: str,
    year: int,
    class_names: Sequence[str] = CLASS_NAMES,
) -> None:
    """Register a split of Pascal VOC; nothing is read yet.

    Args:
        name: by which configs name the dataset.
        dirname: folder with ``Annotations``, ``ImageSets`` and ``JPEGImages``.
        split: a file of ``ImageSets/Main``, without its ending.
        year: 2007 is evaluated by the 11-point AP, others by the area under the curve.
        class_names: the classes, in the order of their indices.
    """
    classes = list(class_names)
    DatasetCatalog.register(name, lambda: load_voc_instances(dirname, split, classes))
    MetadataCatalog.get(name).set(
        thing_classes=classes,
        dirname=dirname,
        year=year,
        split=split,
    )
