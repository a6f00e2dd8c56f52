"""YOLO: one text file per image, one box or one polygon per line, in shares of the image size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from d2kit.data._image_survey import survey_images
from d2kit.data.conversion._common import (
    CocoBuilder,
    Polygons,
    annotations_by_image,
    check_numbers,
    class_names,
    decode_mask,
    find_images,
    need_folder,
    side_files,
)
from d2kit.data.datasets._validate import DatasetError
from d2kit.utils.file_io import atomic_write

FINER = 4
"""By how much a mask is enlarged before its outline is taken."""


def read_yolo(path: Path, images: Path | None = None) -> dict[str, Any]:
    """Read ``labels/**/*.txt`` (or the text files themselves) and ``data.yaml``.

    Args:
        path: the folder.
        images: image folder, by default ``images`` in `path`; sizes come from there.
    """
    if images is None and (path / "images").is_dir():
        images = path / "images"
    root = need_folder(images, "YOLO's files do not tell the sizes of images")
    names = _names(path / "data.yaml")
    builder = CocoBuilder(path, names)
    folder = path / "labels" if (path / "labels").is_dir() else path
    known = find_images(root)
    labels = {f.relative_to(folder).with_suffix("").as_posix(): f for f in folder.rglob("*.txt")}
    labels = {stem: f for stem, f in labels.items() if stem in known or folder.name == "labels"}
    sizes = survey_images([{"file_name": name} for name in known.values()], root)
    for stem in sorted({*known, *labels}):
        if stem not in known:
            builder.problems.add(str(labels[stem]), "image", f"no image '{stem}.*' in '{root}'")
            continue
        size = sizes[known[stem]]
        if size.problem:
            builder.problems.add(f"image '{known[stem]}'", "file", size.problem)
            continue
        image_id = builder.image(known[stem], size.width, size.height)
        for number, line in enumerate(_lines(labels.get(stem)), start=1):
            where = f"{labels[stem]}: line {number}"
            _read_line(builder, line, image_id, (size.width, size.height), names, where)
    return builder.finish()


def _names(file: Path) -> list[str]:
    if not file.is_file():
        raise FileNotFoundError(f"'{file}' does not exist; expected are 'names: [class, ...]'")
    try:
        names = (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get("names")
    except (yaml.YAMLError, AttributeError) as error:
        raise DatasetError(
            f"{file}: not YAML of the form 'names: [class, ...]' ({error})"
        ) from error
    if isinstance(names, dict):
        names = [names[k] for k in sorted(names)]
    if not isinstance(names, list) or not names:
        raise DatasetError(f"{file}: names: expected a list of classes, got {names!r:.60}")
    return [str(name) for name in names]


def _lines(file: Path | None) -> list[str]:
    lines = file.read_text(encoding="utf-8").splitlines() if file else []
    return [line for line in lines if line.strip()]


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
        builder.add(image_id, name, [x - w / 2, y - h / 2, w, h])
    elif len(values) >= 6 and len(values) % 2 == 0:
        builder.add(image_id, name, [[v * size[i % 2] for i, v in enumerate(values)]])
    else:
        what = "expected a class and 4 numbers (box), or at least 3 points"
        raise DatasetError(f"{where}: {what}, got {len(values)} numbers")


def write_yolo(coco: Mapping[str, Any], path: Path) -> Counter[str]:
    """Write ``labels/<image>.txt`` and ``data.yaml``.

    Parts of an object are joined by seams of no width, which a line can hold.
    """
    lost: Counter[str] = Counter()
    names, of_image = class_names(coco), annotations_by_image(coco)
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
                values = joined(_polygons(a["segmentation"], size[1], size[0])) or values
            shares = (f"{v / size[i % 2]:.6f}" for i, v in enumerate(values))
            lines.append(f"{index[a['category_id']]} {' '.join(shares)}\n")
        with atomic_write(files[image["id"]], "w") as file:
            file.writelines(lines)
    with atomic_write(path / "data.yaml", "w") as file:
        yaml.safe_dump({"nc": len(names), "names": [*names.values()]}, file, allow_unicode=True)
    return +lost


def _polygons(segmentation: Any, height: int, width: int) -> Polygons:
    """Return polygons of a mask; those of holes too, so that even-odd filling leaves them out."""
    if not isinstance(segmentation, dict):
        return segmentation
    import cv2

    mask = decode_mask(segmentation, height, width).astype(np.uint8)
    if not mask.any():
        return []
    y, x = np.flatnonzero(mask.any(1))[0], np.flatnonzero(mask.any(0))[0]
    mask = mask[y : np.flatnonzero(mask.any(1))[-1] + 1, x : np.flatnonzero(mask.any(0))[-1] + 1]
    # Outlines run through the centres of pixels: small pixels keep them at the edge of large ones.
    mask = mask.repeat(FINER, 0).repeat(FINER, 1)
    contours, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    found = []
    for contour in contours:
        points = (contour[:, 0] + 0.5) / FINER + [x, y]
        found.append(points.ravel().tolist())
    return found


def joined(polygons: Polygons) -> list[float]:
    """Join polygons by seams of no width that start and end at the first point of the first."""
    if not polygons:
        return []
    first = polygons[0]
    line = [*first]
    for polygon in polygons[1:]:
        line += [*first[:2], *polygon, *polygon[:2]]
    return line if len(polygons) == 1 else [*line, *first[:2]]
