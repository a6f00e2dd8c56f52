"""Tracks drawn on a frame, fast: only the pixels of each object are touched."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from d2kit.tracking import Sighting
from d2kit.visualization._colors import palette

__all__ = ["draw_tracks", "track_color"]

_OPACITY = 0.4


def track_color(identity: int) -> tuple[int, int, int]:
    """Return the BGR colour of an identity in [0, 255]: always the same one."""
    red, green, blue = palette(identity)
    return round(blue * 255), round(green * 255), round(red * 255)


def draw_tracks(
    image: np.ndarray,
    sightings: Sequence[Sighting],
    names: Sequence[str],
    time: float,
    *,
    untinted: Collection[int] = (),
) -> None:
    """Draw masks, boxes, identities and the time, in place.

    Args:
        image: (H, W, 3) uint8 BGR, contiguous.
        sightings: the tracks; masks as `MaskPatch`. Interpolated boxes are thin.
        names: of the classes.
        time: of the frame, seconds.
        untinted: identities whose mask is not drawn.
    """
    thick = max(1, round(min(image.shape[:2]) / 400))
    for sighting in sightings:
        shown = sighting.mask is not None and sighting.track_id not in untinted
        if shown and sighting.mask.bits.size:
            _tint(image, sighting, thick)
    for sighting in sightings:
        _box(image, sighting, names, thick)
    _text(image, _clock(time), (4, image.shape[0] - 5), (0, 0, 0), thick)


def _tint(image: np.ndarray, sighting: Sighting, thick: int) -> None:
    import cv2

    patch, color = sighting.mask, track_color(sighting.track_id)
    height, width = patch.bits.shape
    part = image[patch.y : patch.y + height, patch.x : patch.x + width]
    tinted = cv2.addWeighted(part, 1 - _OPACITY, np.full_like(part, color), _OPACITY, 0)
    cv2.copyTo(tinted, patch.bits, part)
    outlines, _ = cv2.findContours(
        patch.bits, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE, offset=(patch.x, patch.y)
    )
    cv2.drawContours(image, outlines, -1, color, thick)


def _box(image: np.ndarray, sighting: Sighting, names: Sequence[str], thick: int) -> None:
    import cv2

    color = track_color(sighting.track_id)
    x0, y0, x1, y1 = (round(v) for v in sighting.box)
    line = thick if sighting.interpolated else 2 * thick
    cv2.rectangle(image, (x0, y0), (x1, y1), color, line)
    name = names[sighting.class_id] if sighting.class_id < len(names) else str(sighting.class_id)
    _text(image, f"{sighting.track_id} {name}", (x0, y0 - 3), color, thick)


def _text(
    image: np.ndarray, text: str, corner: tuple[int, int], color: tuple[int, ...], thick: int
) -> None:
    """Write on a ground of `color`, whose lower left corner is moved into the picture."""
    import cv2

    scale = 0.4 * thick
    (width, height), below = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, thick)
    x = min(max(corner[0], 0), max(0, image.shape[1] - width - 4))
    y = min(max(corner[1], height + below + 2), image.shape[0] - 2)
    cv2.rectangle(image, (x, y - height - below), (x + width + 3, y + 2), color, cv2.FILLED)
    light = 0.114 * color[0] + 0.587 * color[1] + 0.299 * color[2] > 128
    ink = (0, 0, 0) if light else (255, 255, 255)
    cv2.putText(
        image, text, (x + 2, y - below // 2), cv2.FONT_HERSHEY_SIMPLEX, scale, ink, thick, 16
    )


def _clock(time: float) -> str:
    minutes, seconds = divmod(time, 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02d}:{seconds:05.2f}"
