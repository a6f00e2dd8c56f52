"""Skeletons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_THRESHOLD = 0.05  # keypoints of a lower score are not drawn
_Point = tuple[float, float]


def visible_points(keypoints: Any, names: Sequence[str] | None) -> dict[str | int, _Point]:
    """Return x, y of the visible keypoints by name (by index where there are no names)."""
    points: dict[str | int, _Point] = {}
    for index, (x, y, score) in enumerate(keypoints):
        if score > _THRESHOLD:
            key = names[index] if names and index < len(names) else index
            points[key] = (float(x), float(y))
    return points


def spine(points: Mapping[str | int, _Point]) -> list[tuple[_Point, _Point]]:
    """Return the lines nose - middle of shoulders - middle of hips, where these are visible."""
    middles = {}
    for part in ("shoulder", "hip"):
        left, right = points.get(f"left_{part}"), points.get(f"right_{part}")
        if left is not None and right is not None:
            middles[part] = ((left[0] + right[0]) / 2, (left[1] + right[1]) / 2)
    lines = []
    if "shoulder" in middles:
        if "nose" in points:
            lines.append((points["nose"], middles["shoulder"]))
        if "hip" in middles:
            lines.append((middles["shoulder"], middles["hip"]))
    return lines
