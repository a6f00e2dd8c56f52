"""YOLO: one text file per image, one box or one polygon per line, in shares of the image size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from d2kit.data._image_survey import survey_images
from d2kit.data.conversion._common import (
    DIGITS,
    CocoBuilder,
    annotations_by_image,
    check_numbers,
    class_names,
    find_images,
    side_files,
)
from d2kit.data.conversion._outline import one_line
from d2kit.data.datasets._validate import DatasetError
from d2kit.utils.file_io import atomic_write

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
