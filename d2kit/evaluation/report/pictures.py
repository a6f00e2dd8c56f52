"""Pictures of a report: truth beside prediction, coloured by right and wrong."""

from __future__ import annotations

import base64
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from d2kit.evaluation.report.figures import Figures

__all__ = ["Pair", "choose", "draw_pairs"]

PANE = 640
"""Longest side of a picture in the page, pixels; smaller images are enlarged up to 3 times."""
QUALITY = 80
RIGHT, WRONG = (0.10, 0.45, 0.95), (1.0, 0.45, 0.0)
"""Blue and orange, which all eyes tell apart."""
MOST = 40
"""Objects drawn per picture."""


@dataclass
class Pair:
    """An image: its file's name, a caption, and the two pictures as data URLs, "" if unreadable."""

    name: str
    caption: str
    truth: str
    prediction: str


def choose(figures: Figures, worst: int, best: int) -> tuple[list[int], list[int]]:
    """Choose images: most errors first; and those without an error that hold most objects.

    Args:
        figures: of the test set.
        worst: most images with errors.
        best: most images without.

    Returns:
        Ids of both.
    """
    order = sorted(figures.errors, key=lambda i: (-sum(figures.errors[i][1:]), figures.errors[i]))
    bad = [i for i in order if sum(figures.errors[i][1:])][:worst]
    good = [i for i in figures.errors if not sum(figures.errors[i][1:]) and figures.errors[i][0]]
    return bad, sorted(good, key=lambda i: -figures.errors[i][0])[:best]


def draw_pairs(
    ids: Sequence[int],
    figures: Figures,
    coco: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    image_root: str,
) -> list[Pair]:
    """Draw images twice: truth (orange: missed), and prediction (orange: wrong).

    Args:
        ids: of the images.
        figures: of the test set.
        coco: its annotations.
        results: COCO results, as `figures` were computed from.
        image_root: folder of the images; those that are not there are told, not drawn.
    """
    names = {c["id"]: str(c["name"]) for c in coco["categories"]}
    images = {image["id"]: image for image in coco["images"]}
    wanted = set(ids)
    truths, found = defaultdict(list), defaultdict(list)
    for a in coco["annotations"]:
        if a["image_id"] in wanted and not a.get("iscrowd", 0):
            truths[a["image_id"]].append((a, a["id"] in figures.found, names[a["category_id"]]))
    for i, r in enumerate(results):
        if r["image_id"] in wanted and r["score"] >= figures.threshold:
            label = f"{names.get(r['category_id'], '?')} {100 * r['score']:.0f}%"
            found[r["image_id"]].append((r, i in figures.right, label))
    pairs = []
    for i in ids:
        right, wrong, missed = figures.errors[i]
        caption = f"{right} right, {wrong} wrong, {missed} missed"
        path = Path(image_root) / images[i]["file_name"]
        panes = [_draw(path, part[i]) for part in (truths, found)]
        pairs.append(Pair(str(images[i]["file_name"]), caption, *panes))
    return pairs


def _draw(path: Path, objects: Sequence[tuple[Mapping[str, Any], bool, str]]) -> str:
    from d2kit.data.detection_utils import read_image
    from d2kit.visualization import Visualizer

    try:
        image = read_image(str(path), "RGB")
    except Exception:  # the pictures were moved, or are broken: the page goes without
        return ""
    scale = min(3.0, PANE / max(image.shape[:2]))
    objects = objects[:MOST]
    pane = Visualizer(image, {}, scale=scale)
    segments = [_segments(entry, image.shape[:2]) for entry, _, _ in objects]
    boxes = np.array([entry["bbox"] for entry, _, _ in objects], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    masked = bool(objects) and all(s is not None for s in segments)
    pane.overlay_instances(
        boxes=boxes,
        masks=segments if masked else None,
        labels=[text for _, _, text in objects],
        assigned_colors=[RIGHT if right else WRONG for _, right, _ in objects],
        alpha=0.35,
    )
    return _data_url(pane.output.get_image())


def _segments(entry: Mapping[str, Any], size: tuple[int, int]) -> np.ndarray | None:
    """Return the mask of an annotation or result as (H, W) bool; None where it has none."""
    from pycocotools import mask as rle

    value = entry.get("segmentation")
    if not value:
        return None
    if isinstance(value, list):
        value = rle.merge(rle.frPyObjects(value, *size))
    elif isinstance(value["counts"], list):
        value = rle.frPyObjects(value, *size)
    found: np.ndarray = rle.decode(value).astype(bool)
    return found if found.shape == tuple(size) else None


def _data_url(picture: np.ndarray) -> str:
    import cv2

    longest = max(picture.shape[:2])
    if longest > PANE:
        size = [max(1, round(s * PANE / longest)) for s in picture.shape[1::-1]]
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    done, data = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    assert done
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()
