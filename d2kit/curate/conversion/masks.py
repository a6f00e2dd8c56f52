"""Mask PNGs: the value of a pixel is the number of the instance; 0 is background."""

from __future__ import annotations

import io
import json
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
    files_below,
    find_images,
    side_files,
)
from d2kit.data.datasets.validate import all_numbers, path_problem, read_json
from d2kit.data.image_io import read_label_map
from d2kit.utils.file_io import atomic_write

INDEX = "instances.json"


def read_masks(
    path: Path, images: Path | None = None, lost: Counter[str] | None = None
) -> dict[str, Any]:
    """Read mask PNGs in one of two layouts.

    ``instances.json`` beside them: ``{"classes": ["cat"], "images": [{"file_name": "1.jpg",
    "width": 64, "height": 48, "masks": ["masks/1.png"], "instances": [{"mask": 0, "value": 1,
    "class": "cat"}]}]}``; an instance may have ``iscrowd``, and ``bbox`` where it is not the
    box of the pixels.
    Without it, a folder per class: ``cat/1.png`` holds the cats of image 1; a mask of one value (0
    and 255) is one instance.

    Args:
        path: the folder.
        images: image folder; in the second layout it gives images their endings, else ".png".
        lost: not used.
    """
    if (path / INDEX).is_file():
        return _read_indexed(path)
    classes = sorted(p.name for p in path.iterdir() if p.is_dir())
    builder = CocoBuilder(path, classes)
    endings = find_images(images) if images else {}
    ids: dict[str, int] = {}
    for name in classes:
        for file in files_below(path / name, ".png"):
            stem = file.relative_to(path / name).with_suffix("").as_posix()
            labels = read_label_map(file)
            if stem not in ids:
                shown = endings.get(stem, f"{stem}.png")
                ids[stem] = builder.image(shown, labels.shape[1], labels.shape[0])
            for value in np.unique(labels[labels > 0]).tolist():
                builder.add(ids[stem], name, encode_mask(labels == value))
    return builder.finish()


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
                extra = {"iscrowd": int(bool(instance.get("iscrowd")))}
                box = instance.get("bbox")
                if all_numbers(box) and len(box) == 4:
                    extra["bbox"] = box
                builder.add(image_id, str(instance["class"]), encode_mask(mask), **extra)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            builder.problems.add(where, "entry", f"not of the documented form: {error!r}")
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
