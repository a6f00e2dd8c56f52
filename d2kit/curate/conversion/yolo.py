"""YOLO: one text file per image, one box or one polygon per line, in shares of the image size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from d2kit.curate.conversion.common import (
    DIGITS,
    CocoBuilder,
    Polygons,
    annotations_by_image,
    check_numbers,
    class_names,
    decode_mask,
    find_images,
    side_files,
)
from d2kit.curate.findings import survey_images
from d2kit.data.datasets.validate import DatasetError
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
    """Read text files of boxes and polygons, and ``data.yaml`` (or ``classes.txt``).

    The labels of ``x/images/y/1.jpg`` are ``x/labels/y/1.txt``, a file of the same place in `path`
    or its folder ``labels``, or the text file beside the image. An image without any has no object.

    Args:
        path: the folder, or its ``data.yaml``, of which the classes are read.
        images: image folder, by default ``images`` in `path`, else `path`.
        lost: not used.

    Raises:
        FileNotFoundError: no image, no labels, or no classes.
        DatasetError: one line for each problem.
    """
    base = path.parent if path.is_file() else path
    root = images or (base / "images" if (base / "images").is_dir() else base)
    names = _names(path, base)
    known = find_images(root)
    labels = _labels(base, root, known)
    builder = CocoBuilder(path, names)
    for file in _without_image(base, images, labels):
        builder.problems.add(str(file), "image", f"no image '{file.stem}.*' in '{root}'")
    sizes = survey_images([{"file_name": name} for name in known.values()], root)
    for stem, name in known.items():
        size = sizes[name]
        if size.problem:
            builder.problems.add(f"image '{name}'", "file", size.problem)
            continue
        image_id = builder.image(name, size.width, size.height)
        for number, line in enumerate(_lines(labels.get(stem)), start=1):
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


def _without_image(base: Path, images: Path | None, labels: Mapping[str, Path]) -> list[Path]:
    """Return the text files in folders of labels that belong to no image."""
    used = set(labels.values())
    if images is None:
        files = {f for f in base.rglob("*.txt") if "labels" in f.relative_to(base).parts}
    else:
        files = {f for folder in {f.parent for f in used} for f in folder.glob("*.txt")}
        files = {f for f in files if f.parent != base or base.name == "labels"}
    return sorted(f for f in files - used if f.name != CLASSES)


def _names(path: Path, base: Path) -> list[str]:
    """Return the classes: of ``data.yaml``, also a folder above, or a line each of a text file."""
    places = [base / "data.yaml", base.parent / "data.yaml", base / CLASSES]
    places = [path] if path.is_file() else [*places, base / "labels" / CLASSES]
    file = next((p for p in places if p.is_file()), None)
    if file is None:
        raise FileNotFoundError(
            f"'{places[0]}' does not exist; expected 'names: [class, ...]'; "
            "INPUT may be the YAML file itself"
        )
    text = file.read_text(encoding="utf-8-sig")
    if file.suffix == ".txt":
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        content = yaml.safe_load(text) or {}
        names = content.get("names")
    except (yaml.YAMLError, AttributeError) as error:
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
    return [str(name) for name in names]


def _lines(file: Path | None) -> list[str]:
    lines = file.read_text(encoding="utf-8-sig").splitlines() if file else []
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
        points = [round(v * size[i % 2], DIGITS) for i, v in enumerate(values)]
        builder.add(image_id, name, [points])
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
