"""Splits a dataset in COCO format: at random, by class shares, or so that groups stay whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from d2kit.data.records import group_images

__all__ = ["METHODS", "split_coco"]


HASH_SIDE = 16
CLOSE = 0.1
"""Share of the bits in which two pictures of one scene may differ.

Measured as largest distance (Penn-Fudan, 170 photographs): JPEG of quality 30 0.09, half the size
0.07, 40 % darker 0.09, 2 % cut off 0.12 (90 % of them below 0.09), 5 % cut off 0.27 (median 0.16);
different photographs are 0.35 apart at least. Rooms of the synthetic ward, which look alike, are
0.117 apart at least (48 rooms, 10,152 pairs), frames of one room 5 s apart 0.105.
"""


class Leak(NamedTuple):
    """Two images of different parts that look the same."""

    first: str
    second: str
    distance: float


def difference_hash(image: np.ndarray) -> np.ndarray:
    """Return the signs of the horizontal differences of a small grey copy of an image.

    Args:
        image: (H, W, 3) or (H, W) uint8.

    Returns:
        (256,) bool; the share of bits in which two hashes differ measures how different the images
        look, whatever their size, brightness and noise.

    Source: the difference hash, Krawetz 2013, "Kind of Like That" (hackerfactor.com/blog).
    """
    import cv2

    grey = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY) if image.ndim == 3 else image
    small = cv2.resize(grey, (HASH_SIDE + 1, HASH_SIDE), interpolation=cv2.INTER_AREA)
    return (small[:, 1:] > small[:, :-1]).ravel()


def shared_groups(
    parts: Mapping[str, Mapping[str, Any]], key: str = "video"
) -> dict[str, list[str]]:
    """Return group -> names of the parts, for groups with images in more than one part.

    Args:
        parts: name -> COCO dictionary.
        key: see `group_images`.
    """
    where: dict[str, list[str]] = {}
    for name, coco in parts.items():
        for group in group_images(coco, key):
            where.setdefault(group, []).append(name)
    return {group: names for group, names in where.items() if len(names) > 1}


def find_leaks(
    parts: Mapping[str, Sequence[Path]],
    *,
    threshold: float = CLOSE,
    progress: Callable[[int], object] = lambda done: None,
) -> list[Leak]:
    """Return the pairs of images in different parts that look the same, the closest first.

    Args:
        parts: name -> image files.
        threshold: largest share of differing bits, in [0, 1).
        progress: called with the number of images read since the last call.

    Raises:
        ValueError: if a file cannot be read as an image.
    """
    files = [(name, path) for name, paths in parts.items() for path in paths]
    if not files:
        return []

    def hashed(entry: tuple[str, Path]) -> np.ndarray:
        import cv2

        image = cv2.imread(str(entry[1]), cv2.IMREAD_GRAYSCALE)
        if image is None:
            raise ValueError(f"{entry[1]}: cannot be read as an image")
        progress(1)
        return difference_hash(image)

    with ThreadPoolExecutor() as pool:
        bits = np.stack(list(pool.map(hashed, files))).astype(np.float32)
    owner = np.array([list(parts).index(name) for name, _ in files])
    leaks = []
    for start in range(0, len(files), 1024):
        rows = bits[start : start + 1024]
        differing = rows.sum(1)[:, None] + bits.sum(1)[None] - 2 * rows @ bits.T
        share = differing / bits.shape[1]
        later = owner[start : start + 1024, None] < owner[None]
        for i, j in np.argwhere((share <= threshold) & later):
            leaks.append(Leak(str(files[start + i][1]), str(files[j][1]), float(share[i, j])))
    return sorted(leaks, key=lambda leak: leak.distance)


METHODS = ("random", "stratified", "group")


def split_coco(
    coco: Mapping[str, Any],
    shares: Mapping[str, float],
    *,
    method: str = "stratified",
    group: str | None = None,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Split a COCO dictionary; every image is in exactly one part.

    Args:
        coco: "images", "annotations", "categories" and whatever else; not changed.
        shares: name of the part -> share of the images; together 1.
        method: ``random``; ``stratified``: each part gets its share of the instances of every
            class; ``group``: the same, but groups stay whole.
        group: what makes a group, see `d2kit.data.records.group_images`; by default ``video``.
        seed: the same seed gives the same split.

    Returns:
        Name -> COCO dictionary with the part's images and annotations, ids unchanged.

    Raises:
        ValueError: if the shares are not positive or do not add up to 1, the method is unknown, or
            there are fewer units (images or groups) than parts.

    Source: iterative stratification, Sechidis et al. 2011, section 3.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {METHODS}, got '{method}'")
    if not shares or min(shares.values()) <= 0 or abs(sum(shares.values()) - 1) > 1e-6:
        raise ValueError(f"shares: expected positive numbers that add up to 1, got {dict(shares)}")
    if method == "group":
        units = list(group_images(coco, group or "video").values())
    else:
        units = [[image["id"]] for image in coco["images"]]
    if len(units) < len(shares):
        what = "groups" if method == "group" else "images"
        raise ValueError(f"{len(shares)} parts were asked for, but there are {len(units)} {what}")
    rng = np.random.default_rng(seed)
    table = _class_counts(coco, units)
    if method == "random":
        table = np.zeros((len(units), 0))
    sizes = np.array([len(unit) for unit in units], float)
    places = _assign(table, sizes, list(shares.values()), rng)
    return {
        name: _part(
            coco, {i for unit, p in zip(units, places, strict=True) if p == k for i in unit}
        )
        for k, name in enumerate(shares)
    }


def _class_counts(coco: Mapping[str, Any], units: Sequence[Sequence[int]]) -> np.ndarray:
    """Return the (units, classes) number of annotations."""
    column = {c["id"]: k for k, c in enumerate(coco["categories"])}
    row = {image: u for u, unit in enumerate(units) for image in unit}
    table = np.zeros((len(units), len(column)))
    for annotation in coco["annotations"]:
        if annotation["image_id"] in row and annotation["category_id"] in column:
            table[row[annotation["image_id"]], column[annotation["category_id"]]] += 1
    return table


def _assign(
    counts: np.ndarray, sizes: np.ndarray, shares: Sequence[float], rng: np.random.Generator
) -> np.ndarray:
    """Return the (units,) part of each unit.

    Rarest class first, its largest units first; each goes to the part that lacks most of that
    class, then most images. Ties are broken at random. What comes before that: no part stays
    empty, none is overfull by more than half a unit, and a class is in every part that it can be
    in: its last units go to the parts without one.
    """
    none_yet = np.ones((len(shares), counts.shape[1]), bool)
    weight = np.array(shares)
    lacking = counts.sum(0)[None] * weight[:, None]  # (parts, classes)
    room = sizes.sum() * weight
    places = np.full(len(sizes), -1)
    left = counts.copy()
    while (places < 0).any():
        free = places < 0
        totals = left[free].sum(0)
        present = np.flatnonzero(totals > 0)
        if len(present):
            k = present[totals[present].argmin()]
            candidates = np.flatnonzero(free & (left[:, k] > 0))
            order = np.lexsort((rng.random(len(candidates)), -left[candidates, k]))
            wanted, without = lacking[:, k], none_yet[:, k]
        else:
            candidates = np.flatnonzero(free)
            order = np.lexsort((rng.random(len(candidates)), -sizes[candidates]))
            wanted, without = np.zeros(len(weight)), np.zeros(len(weight), bool)
        for done, unit in enumerate(candidates[order]):
            empty = np.array([(places == p).sum() == 0 for p in range(len(weight))])
            still = (places < 0).sum()
            allowed = empty if still <= empty.sum() else np.ones(len(weight), bool)
            fits = room >= sizes[unit] / 2
            last = without & (len(candidates) - done <= without.sum())
            keys = (rng.random(len(weight)), room, wanted, last, fits, allowed)
            part = int(np.lexsort(keys)[-1])
            places[unit] = part
            lacking[part] -= counts[unit]
            room[part] -= sizes[unit]
            none_yet[part] &= counts[unit] == 0
            left[unit] = 0
    return places


def _part(coco: Mapping[str, Any], image_ids: set[int]) -> dict[str, Any]:
    images = [image for image in coco["images"] if image["id"] in image_ids]
    part = {**coco, "images": images}
    part["annotations"] = [a for a in coco["annotations"] if a["image_id"] in image_ids]
    if "videos" in coco:
        used = {image.get("video_id") for image in images}
        part["videos"] = [video for video in coco["videos"] if video["id"] in used]
    return part
