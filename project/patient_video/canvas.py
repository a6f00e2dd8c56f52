"""A drawing surface that keeps, beside the colours, which object each pixel belongs to."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

SUPERSAMPLE = 2  # drawn at twice the size, then averaged: smooth edges, and masks to half a pixel
SHIFT = 4  # cv2 takes fixed-point coordinates with this many fractional bits

Point = tuple[float, float]
Colour = tuple[float, float, float]


class Canvas:
    """Colours (RGB) and object labels of one frame, drawn back to front.

    Args:
        width: frame width in pixels.
        height: frame height in pixels.
        unit: pixels per scene unit (the scene is 320 x 240 units).
        origin: point of the scene, in its units, at the frame's upper left corner.

    Attributes:
        rgb: (2H, 2W, 3) uint8.
        label: (2H, 2W) uint8; 0 is background, other values name an object.
    """

    def __init__(self, width: int, height: int, unit: float, origin: Point = (0.0, 0.0)) -> None:
        self.size = (width, height)
        self.origin = origin
        self.unit = unit * SUPERSAMPLE
        self.rgb = np.zeros((height * SUPERSAMPLE, width * SUPERSAMPLE, 3), np.uint8)
        self.label = np.zeros(self.rgb.shape[:2], np.uint8)

    def polygon(self, points: Sequence[Point], colour: Colour, label: int = 0) -> None:
        """Fill a polygon given in scene units."""
        placed = (np.asarray(points) - self.origin) * self.unit
        fixed = np.round(placed * (1 << SHIFT)).astype(np.int32)
        for target, value in ((self.rgb, _byte(colour)), (self.label, label)):
            cv2.fillPoly(target, [fixed], value, lineType=cv2.LINE_8, shift=SHIFT)

    def rectangle(self, x0: float, y0: float, x1: float, y1: float, colour: Colour) -> None:
        """Fill an axis-parallel rectangle of background."""
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], colour)

    def ellipse(
        self, centre: Point, axes: Point, angle: float, colour: Colour, label: int = 0
    ) -> None:
        """Fill an ellipse with half-axes `axes`, turned by `angle` degrees."""
        placed = [c - o for c, o in zip(centre, self.origin, strict=True)]
        centre_px = tuple(int(round(c * self.unit * (1 << SHIFT))) for c in placed)
        axes_px = tuple(int(round(a * self.unit * (1 << SHIFT))) for a in axes)
        for target, value in ((self.rgb, _byte(colour)), (self.label, label)):
            cv2.ellipse(target, centre_px, axes_px, angle, 0, 360, value, -1, cv2.LINE_8, SHIFT)

    def limb(self, start: Point, end: Point, radii: Point, colour: Colour, label: int = 0) -> None:
        """Fill a tapered capsule from `start` to `end`, lit from above."""
        self._capsule(start, end, radii, colour, label)
        lit = tuple(min(255.0, c * 1.12 + 4) for c in colour)
        lift = (0.0, -0.35)
        a = (start[0] + lift[0] * radii[0], start[1] + lift[1] * radii[0])
        b = (end[0] + lift[0] * radii[1], end[1] + lift[1] * radii[1])
        self._capsule(a, b, (radii[0] * 0.55, radii[1] * 0.55), lit, label)

    def _capsule(self, start: Point, end: Point, radii: Point, colour: Colour, label: int) -> None:
        p, q = np.asarray(start), np.asarray(end)
        along = q - p
        length = float(np.hypot(*along))
        if length > 1e-6:
            side = np.array([-along[1], along[0]]) / length
            corners = [
                p + side * radii[0],
                q + side * radii[1],
                q - side * radii[1],
                p - side * radii[0],
            ]
            self.polygon([tuple(c) for c in corners], colour, label)
        for centre, radius in ((start, radii[0]), (end, radii[1])):
            self.ellipse(centre, (radius, radius), 0, colour, label)

    def image(self) -> np.ndarray:
        """Return the (H, W, 3) uint8 RGB frame."""
        return cv2.resize(self.rgb, self.size, interpolation=cv2.INTER_AREA)

    def mask(self, label: int) -> np.ndarray:
        """Return the (H, W) bool mask of the visible pixels of object `label`.

        A pixel belongs to the object when more than half of its area does, so that masks of
        different objects never share one.
        """
        covered = (self.label == label).astype(np.uint8) * 255
        return cv2.resize(covered, self.size, interpolation=cv2.INTER_AREA) > 128


def _byte(colour: Colour) -> tuple[int, int, int]:
    return tuple(int(min(255, max(0, c))) for c in colour)  # type: ignore[return-value]
