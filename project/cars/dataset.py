"""Folders of pictures of one car each (split / class / picture) as COCO JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from project.cars.drawing import CLASS_NAMES, SPLITS
from project.masks import mask_annotation

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
ALIASES = {"training": "train", "valid": "val", "validation": "val", "testing": "test"}
PUBLISHED = (4957, 2887, 590)  # pictures in the splits of the published set
PUBLISHED_SIZE = {(160, 240), (240, 160)}
MARGIN = (0.03, 0.06)  # share of width and height at the edges that GrabCut takes for background
PLAUSIBLE = (0.08, 0.9)  # share of the picture that a car covers; else the full frame is taken


def split_name(split: str) -> str:
    """Return the name under which a split is registered."""
    return f"cars_{split}"


def describe_set(counts: Mapping[str, Mapping[str, int]], sizes: set[tuple[int, int]]) -> str:
    """Say whether a set has the published shape: 4,957, 2,887 and 590 pictures of 160 x 240.

    Args:
        counts: of `prepare`.
        sizes: (height, width) of the pictures.
    """
    images = sorted((found["images"] for found in counts.values()), reverse=True)
    if tuple(images) == PUBLISHED and len(sizes) == 1 and sizes <= PUBLISHED_SIZE:
        return "the shape of the published set: 4,957 / 2,887 / 590 pictures of 160 x 240"
    shapes = ", ".join(f"{h} x {w}" for h, w in sorted(sizes)[:3])
    more = f" and {len(sizes) - 3} other sizes" if len(sizes) > 3 else ""
    found = " / ".join(f"{count:,}" for count in images)
    return (
        f"not the published set (4,957 / 2,887 / 590 pictures of 160 x 240): {found} pictures of "
        f"{shapes}{more} (height x width)"
    )


def read_sizes(folder: Path) -> set[tuple[int, int]]:
    """Return the (height, width) that occur in the JSON files of `prepare`."""
    files = [json.loads(p.read_text()) for p in folder.glob("*.json") if p.stem in SPLITS]
    return {(im["height"], im["width"]) for coco in files for im in coco["images"]}


def cut_out(bgr: np.ndarray) -> np.ndarray | None:
    """Separate the object in the middle of a picture from its background.

    Args:
        bgr: (H, W, 3) uint8.

    Returns:
        (H, W) bool, one connected region; None where it is implausibly small or large.

    Source: Rother, Kolmogorov, Blake: GrabCut, SIGGRAPH 2004 (OpenCV's implementation).
    """
    import cv2

    height, width = bgr.shape[:2]
    x, y = round(MARGIN[0] * width), round(MARGIN[1] * height)
    mask = np.zeros((height, width), np.uint8)
    cv2.setRNGSeed(0)  # its k-means draws from OpenCV's generator: the same picture, the same mask
    rectangle = (x, y, width - 2 * x, height - 2 * y)
    models = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.grabCut(bgr, mask, rectangle, *models, 4, cv2.GC_INIT_WITH_RECT)
    seen = np.isin(mask, (cv2.GC_FGD, cv2.GC_PR_FGD)).astype(np.uint8)
    seen = cv2.morphologyEx(seen, cv2.MORPH_OPEN, np.ones((7, 7), np.uint8))  # kerbs, aerials
    outlines, _ = cv2.findContours(seen, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    if not outlines:
        return None
    filled = np.zeros_like(seen)  # the largest region with its holes: glass, hub caps
    cv2.drawContours(filled, [max(outlines, key=cv2.contourArea)], -1, 1, cv2.FILLED)
    return filled.astype(bool) if PLAUSIBLE[0] <= filled.mean() <= PLAUSIBLE[1] else None


def prepare(
    root: Path,
    output: Path,
    *,
    grabcut: bool = True,
    progress: Callable[[int], object] = lambda done: None,
) -> dict[str, dict[str, int]]:
    """Write one COCO JSON file per split of ``ROOT/SPLIT/CLASS/PICTURE``.

    Args:
        root: folder of splits, named as in `SPLITS` or `ALIASES`, in any case.
        output: folder for ``SPLIT.json``.
        grabcut: find box and mask of the car by GrabCut; else, and where GrabCut gives something
            implausible, the full frame is taken.
        progress: called with the number of pictures of each finished class.

    Returns:
        Split -> ``{"images", "grabcut", "frame"}``: pictures, and how their boxes were found.

    Raises:
        FileNotFoundError: there is no picture where it is expected.
        ValueError: a folder of a split or class has an unknown name, two are the same split, or a
            picture cannot be read.
    """
    from d2kit.utils.file_io import atomic_write

    splits = _find_splits(root)
    counts = {}
    for name, split in splits.items():
        found = _read_split(root, split, grabcut, progress)
        if not found["images"]:
            raise FileNotFoundError(f"{split}: no pictures in folders named {CLASS_NAMES}")
        output.mkdir(parents=True, exist_ok=True)
        with atomic_write(output / f"{name}.json", "w") as f:
            json.dump(found, f)
        sources = [a["source"] for a in found["annotations"]]
        counts[name] = {"images": len(sources)} | {
            kind: sources.count(kind) for kind in ("grabcut", "frame")
        }
    return counts


def _find_splits(root: Path) -> dict[str, Path]:
    """Return split -> folder, in the order of `SPLITS`."""
    folders = sorted(p for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
    if not folders:
        raise FileNotFoundError(
            f"{root}: expected folders SPLIT/CLASS/PICTURE, e.g. train/suv/1.jpg, found none"
        )
    found: dict[str, Path] = {}
    for folder in folders:
        name = ALIASES.get(folder.name.lower(), folder.name.lower())
        if name not in SPLITS:
            raise ValueError(f"{folder}: expected a split, one of {(*SPLITS, *ALIASES)}")
        if name in found:
            raise ValueError(f"{folder} and {found[name]} are both '{name}'")
        found[name] = folder
    return {name: found[name] for name in SPLITS if name in found}


def _read_split(
    root: Path, split: Path, grabcut: bool, progress: Callable[[int], object]
) -> dict[str, list]:
    names = {name.lower(): i + 1 for i, name in enumerate(CLASS_NAMES)}
    result: dict[str, list] = {"images": [], "annotations": []}
    for folder in sorted(p for p in split.iterdir() if p.is_dir()):
        if folder.name.lower() not in names:
            raise ValueError(f"{folder}: expected a class folder, one of {CLASS_NAMES}")
        files = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = list(pool.map(lambda file: _annotate(file, grabcut), files))
        for file, (shape, mask) in zip(files, found, strict=True):
            image_id = len(result["images"]) + 1
            size = {"height": shape[0], "width": shape[1]}
            name = file.relative_to(root).as_posix()
            result["images"].append({"id": image_id, "file_name": name, **size})
            whole = np.ones(shape, bool) if mask is None else mask
            entry = {"id": image_id, "image_id": image_id}
            entry |= mask_annotation(whole, names[folder.name.lower()])
            entry["source"] = "frame" if mask is None else "grabcut"
            result["annotations"].append(entry)
        progress(len(files))
    result["categories"] = [{"id": i + 1, "name": name} for i, name in enumerate(CLASS_NAMES)]
    return result


def _annotate(file: Path, grabcut: bool) -> tuple[tuple[int, int], np.ndarray | None]:
    import cv2

    bgr = cv2.imread(str(file))
    if bgr is None:
        raise ValueError(f"{file}: cannot be read as a picture; mend or remove it")
    return bgr.shape[:2], cut_out(bgr) if grabcut else None


def register(root: str | os.PathLike | None = None) -> None:
    """Register ``cars_train``, ``cars_val`` and ``cars_test``."""
    from d2kit.data.datasets import register_coco_instances
    from project.datasets_root import datasets_root

    folder = datasets_root(root) / "cars"
    for split in ("train", "val", "test"):
        register_coco_instances(
            split_name(split),
            {"thing_classes": list(CLASS_NAMES)},
            str(folder / f"{split}.json"),
            str(folder / "images"),
        )
