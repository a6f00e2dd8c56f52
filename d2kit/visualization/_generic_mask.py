"""One mask in whatever form it comes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from d2kit.structures import polygons_to_bitmask


class GenericMask:
    """A mask given as polygons, RLE or pixels, converted on demand.

    Args:
        mask_or_polygons: (H, W) array; list of polygons, each flat x, y, x, y, ... in absolute
            pixels; or RLE dict with ``size`` and ``counts`` (compressed or a list of numbers).
        height: H of the image.
        width: W of the image.

    Raises:
        ValueError: mask or RLE of another size than the image, or of none of these forms.
    """

    def __init__(self, mask_or_polygons: Any, height: int, width: int) -> None:
        self.height = height
        self.width = width
        self._mask: np.ndarray | None = None
        self._polygons: list[np.ndarray] | None = None
        self._has_holes: bool | None = None
        if isinstance(mask_or_polygons, dict):
            self._mask = self._decode(mask_or_polygons)
        elif isinstance(mask_or_polygons, list | tuple):
            self._polygons = [np.asarray(p, dtype=np.float64).reshape(-1) for p in mask_or_polygons]
            self._has_holes = False
        elif hasattr(mask_or_polygons, "__array__"):
            mask = np.asarray(mask_or_polygons)
            if mask.shape != (height, width):
                raise ValueError(
                    f"A mask must have the image's shape {(height, width)}, got {mask.shape}"
                )
            self._mask = mask.astype(np.uint8)
        else:
            raise ValueError(
                "A mask must be an array, a list of polygons or an RLE dict, got "
                f"{type(mask_or_polygons).__name__}"
            )

    def _decode(self, rle: dict[str, Any]) -> np.ndarray:
        """Decode RLE to (H, W) uint8."""
        from pycocotools import mask as mask_util

        missing = {"size", "counts"} - set(rle)
        if missing or tuple(rle["size"]) != (self.height, self.width):
            raise ValueError(
                f"RLE needs `counts` and `size` {[self.height, self.width]}, got "
                f"{rle.get('size')} and keys {sorted(rle)}"
            )
        if isinstance(rle["counts"], list):
            rle = mask_util.frPyObjects(rle, *rle["size"])
        return mask_util.decode(rle)

    @property
    def mask(self) -> np.ndarray:
        """(H, W) uint8 of 0 and 1."""
        if self._mask is None:
            self._mask = self.polygons_to_mask(self._polygons or [])
        return self._mask

    @property
    def polygons(self) -> list[np.ndarray]:
        """Outer outlines, each flat x, y, x, y, ... in continuous pixels."""
        if self._polygons is None:
            self._polygons, self._has_holes = self.mask_to_polygons(self.mask)
        return self._polygons

    @property
    def has_holes(self) -> bool:
        """Whether the polygons leave out a hole of the mask."""
        if self._has_holes is None:
            self._polygons, self._has_holes = self.mask_to_polygons(self.mask)
        return self._has_holes

    @staticmethod
    def mask_to_polygons(mask: np.ndarray) -> tuple[list[np.ndarray], bool]:
        """Trace the outlines of a mask.

        Args:
            mask: (H, W), non-zero inside.

        Returns:
            Outer outlines (flat, through pixel centres, at least 3 points each), and whether
            there is a hole.
        """
        import cv2

        pixels = np.ascontiguousarray(mask, dtype=np.uint8)
        contours, hierarchy = cv2.findContours(pixels, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        if hierarchy is None:
            return [], False
        parents = np.asarray(hierarchy).reshape(-1, 4)[:, 3]
        outer = [c for c, parent in zip(contours, parents, strict=True) if parent < 0]
        polygons = [c.reshape(-1).astype(np.float64) + 0.5 for c in outer if len(c) >= 3]
        return polygons, bool((parents >= 0).any())

    def polygons_to_mask(self, polygons: Sequence[np.ndarray]) -> np.ndarray:
        """Rasterise polygons to (H, W) uint8."""
        if not polygons:
            return np.zeros((self.height, self.width), dtype=np.uint8)
        return polygons_to_bitmask(list(polygons), self.height, self.width).astype(np.uint8)

    def area(self) -> int:
        """Return the number of pixels inside."""
        return int(self.mask.sum())

    def bbox(self) -> np.ndarray:
        """Return the tight box x0, y0, x1, y1; zeros where the mask is empty."""
        rows, columns = np.flatnonzero(self.mask.any(1)), np.flatnonzero(self.mask.any(0))
        if len(rows) == 0:
            return np.zeros(4)
        return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=np.float64)
