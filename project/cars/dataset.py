"""Folders of pictures of one car each (split / class / picture) as COCO JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from project.cars.drawing import CLASS_NAMES
from project.masks import mask_annotation

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
MARGIN = (0.03, 0.06)  # share of width and height at the edges that GrabCut takes for background
PLAUSIBLE = (0.08, 0.9)  # share of the picture that a car covers; else the full frame is taken


def split_name(split: str) -> str:
    """Return the name under which a split is registered."""
    return f"cars_{split}"


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
        root: folder of splits.
        output: folder for ``SPLIT.json``.
        grabcut: find box and mask of the car by GrabCut; else, and where GrabCut gives something
            implausible, the full frame is taken.
        progress: called with the number of pictures of each finished class.

    Returns:
        Split -> ``{"images", "grabcut", "frame"}``: pictures, and how their boxes were found.

    Raises:
        FileNotFoundError: there is no picture where it is expected.
        ValueError: a class folder has an unknown name, or a picture cannot be read.
    """
    from d2kit.utils.file_io import atomic_write

    splits = sorted(p for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
    counts = {}
    for split in splits:
        found = _read_split(root, split, grabcut, progress)
        if not found["images"]:
            raise FileNotFoundError(f"{split}: no pictures in folders named {CLASS_NAMES}")
        output.mkdir(parents=True, exist_ok=True)
        with atomic_write(output / f"{split.name}.json", "w") as f:
            json.dump(found, f)
        sources = [a["source"] for a in found["annotations"]]
        counts[split.name] = {"images": len(sources)} | {
            kind: sources.count(kind) for kind in ("grabcut", "frame")
        }
    if not counts:
        raise FileNotFoundError(
            f"{root}: expected folders SPLIT/CLASS/PICTURE, e.g. train/suv/1.jpg, found none"
        )
    return counts


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
