"""Mask PNGs: the value of a pixel is the number of the instance; 0 is background."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from d2kit.curate.conversion.common import (
    CocoBuilder,
    annotations_by_image,
    class_names,
    decode_mask,
    encode_mask,
    side_files,
)
from d2kit.curate.conversion.foreign import (
    IMAGE_FOLDERS,
    ImageFinder,
    image_files,
    image_root,
)
from d2kit.data.datasets.validate import DatasetError, all_numbers, path_problem, read_json
from d2kit.data.detection_utils import read_label_map
from d2kit.utils.file_io import atomic_write

INDEX = "instances.json"

AFFIX = re.compile(r"(?i)[_\-. ](masks?|labels?|seg|segmentation|gt|instances?)$")
"""What names of masks have behind those of their images."""


def read_masks(
    path: Path, images: Path | None = None, lost: Counter[str] | None = None
) -> dict[str, Any]:
    """Read mask PNGs in one of three layouts.

    ``instances.json`` beside them: ``{"classes": ["cat"], "images": [{"file_name": "1.jpg",
    "width": 64, "height": 48, "masks": ["masks/1.png"], "instances": [{"mask": 0, "value": 1,
    "class": "cat"}]}]}``; an instance may have ``iscrowd``, and ``bbox`` where it is not the
    box of the pixels.
    Folders with "mask" in their names (``masks``, ``PedMasks``): ``masks/1.png`` or
    ``masks/1_mask.png`` is that of image 1, ``masks/cat/1.png`` that of its cats.
    Else a folder per class: ``cat/1.png`` holds the cats of image 1. In both, a value is an
    instance, so that a mask of 0 and 255 is one.

    Args:
        path: the folder.
        images: image folder that names are relative to, by default one named ``images``, ... in
            `path`, else `path`.
        lost: counts images without a mask, and images whose file was not found.

    Raises:
        DatasetError: no layout fits.
    """
    if (path / INDEX).is_file():
        return _read_indexed(path)
    if not path.is_dir():
        raise DatasetError(f"{path}: expected a folder of mask pictures")
    masks = _mask_files(path)
    if not masks:
        raise DatasetError(
            f"{path}: no layout of masks fits: expected '{INDEX}', a folder 'masks' with a PNG "
            "per image, or a folder of PNGs per class"
        )
    used = {file for file, _ in masks}
    finder = ImageFinder(images or image_root(path))
    finder.forget(used)
    builder = CocoBuilder(path, sorted({name for _, name in masks}), lost, finder)
    ids: dict[str, int] = {}
    folders = {name: path / name for name in builder.names or []}
    for file, name in masks:
        folder = folders[name] if folders[name] in file.parents else file.parent
        stem = file.relative_to(folder).with_suffix("").as_posix()
        bare = AFFIX.sub("", stem)
        labels = read_label_map(file)
        shown = finder.find(f"{stem}.png", None) or finder.find(f"{bare}.png", None)
        shown = shown or f"{stem}.png"
        if shown not in ids:
            ids[shown] = builder.image(shown, labels.shape[1], labels.shape[0])
        for value in np.unique(labels[labels > 0]).tolist():
            builder.add(ids[shown], name, encode_mask(labels == value), str(file))
    if masks[0][1] and finder.names:
        builder.lost["images without a mask"] += len(finder.names - ids.keys())
    return builder.finish()


def _mask_files(path: Path) -> list[tuple[Path, str]]:
    """Return the mask pictures with their classes."""
    pictures = [p for p in image_files(path) if p.suffix.lower() == ".png"]
    found = []
    for file in pictures:
        parts = file.relative_to(path).parts[:-1]
        at = next((i for i, part in enumerate(parts) if "mask" in part.lower()), None)
        if at is not None:
            own = re.sub(r"(?i)[_\-. ]*masks?[_\-. ]*", "", parts[at])
            found.append((file, parts[at + 1] if len(parts) > at + 1 else own or "object"))
    flat = [(p, "object") for p in pictures if p.parent == path]
    if found or (flat and "mask" in path.name.lower()):
        return found or flat
    parts_of = [(p, p.relative_to(path).parts) for p in pictures]
    return [(p, q[0]) for p, q in parts_of if len(q) > 1 and q[0].lower() not in IMAGE_FOLDERS]


def _read_indexed(path: Path) -> dict[str, Any]:
    file = path / INDEX
    data = read_json(str(file), str(file))
    classes = data.get("classes")
    builder = CocoBuilder(file, classes if isinstance(classes, list) else None)
    for number, image in enumerate(data.get("images", [])):
        where = f"image number {number}"
        try:
            image_id = builder.image(image["file_name"], image["width"], image["height"])
            outside = [w for w in (path_problem(m, str(path)) for m in image["masks"]) if w]
            if outside:
                builder.problems.add(where, "masks", outside[0])
                continue
            maps = [read_label_map(path / m) for m in image["masks"]]
            for instance in image["instances"]:
                mask = maps[instance["mask"]] == instance["value"]
                if mask.shape != (image["height"], image["width"]) or not mask.any():
                    what = f"no pixel of value {instance['value']} in a mask of the image's size"
                    builder.problems.add(where, "instances", what)
                    continue
                extra: dict[str, Any] = {"iscrowd": int(bool(instance.get("iscrowd")))}
                box = instance.get("bbox")
                if all_numbers(box) and len(box) == 4:
                    extra["bbox"] = box
                builder.add(image_id, str(instance["class"]), encode_mask(mask), **extra)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            builder.problems.add(where, "entry", f"not of the documented form: {error!r}")
        except OSError as error:
            builder.problems.add(where, "masks", f"cannot be read: {error.strerror or error}")
    return builder.finish()


def write_masks(coco: Mapping[str, Any], path: Path) -> Counter[str]:
    """Write ``masks/<image>.png`` (16 bits) and ``instances.json``.

    Objects that overlap go to a further PNG, so that none loses a pixel.
    """
    lost: Counter[str] = Counter()
    names, of_image = class_names(coco), annotations_by_image(coco, lost)
    files = side_files(coco, path / "masks", ".png")
    entries = []
    for image in coco["images"]:
        layers: list[np.ndarray] = []
        instances = []
        for a in of_image[image["id"]]:
            if not a.get("segmentation"):
                lost["boxes without a mask"] += 1
                continue
            mask = decode_mask(a["segmentation"], image["height"], image["width"])
            if not mask.any():
                lost["masks without a pixel"] += 1
                continue
            layer = _place(layers, mask)
            value = int(layers[layer].max()) + 1
            layers[layer][mask] = value
            entry = {"mask": layer, "value": value, "class": names[a["category_id"]]}
            entry["bbox"] = a["bbox"]
            instances.append({**entry, "iscrowd": 1} if a.get("iscrowd") else entry)
        written = [
            _write_png(layer, files[image["id"]], i).relative_to(path).as_posix()
            for i, layer in enumerate(layers)
        ]
        keys = {k: image[k] for k in ("file_name", "width", "height")}
        entries.append({**keys, "masks": written, "instances": instances})
    with atomic_write(path / INDEX, "w") as file:
        json.dump({"classes": [*names.values()], "images": entries}, file, ensure_ascii=False)
    return +lost


def _place(layers: list[np.ndarray], mask: np.ndarray) -> int:
    """Return the first layer where the pixels of a mask are free."""
    for i, layer in enumerate(layers):
        if not layer[mask].any() and layer.max() < np.iinfo(np.uint16).max:
            return i
    layers.append(np.zeros(mask.shape, np.uint16))
    return len(layers) - 1


def _write_png(layer: np.ndarray, path: Path, number: int) -> Path:
    from PIL import Image

    path = path.with_name(f"{path.stem}.{number}.png") if number else path
    buffer = io.BytesIO()
    Image.fromarray(layer).save(buffer, "PNG")
    with atomic_write(path) as file:
        file.write(buffer.getvalue())
    return path
