"""Finds what must not be on both sides of a split: whole videos, and frames that look the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from d2kit.data.groups import group_images

__all__ = ["Leak", "difference_hash", "find_leaks", "shared_groups"]

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
