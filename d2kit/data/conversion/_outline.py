"""Masks as one line of points that gives the same pixels back."""

from __future__ import annotations

from typing import Any

import numpy as np

from d2kit.data.conversion._common import Polygons, decode_mask


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
