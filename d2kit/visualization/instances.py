"""Labels, and the drawing methods of `Visualizer` for sets of instances."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Mapping, Sequence, Sized
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from d2kit.structures import BitMasks, Boxes, Keypoints, RotatedBoxes, polygons_to_bitmask
from d2kit.utils.text import drawn
from d2kit.visualization.drawing import (
    _GOLDEN,
    _RED,
    ColorLike,
    DrawingBase,
    VisImage,
    change_brightness,
    palette,
    to_rgb,
)

if TYPE_CHECKING:
    pass


def create_text_labels(
    classes: Sequence[int] | None,
    scores: torch.Tensor | Sequence[float] | None,
    class_names: Sequence[str] | None,
    is_crowd: Sequence[Any] | None = None,
) -> list[str] | None:
    """Write one label per instance: class, score in percent, whether it is a crowd.

    Args:
        classes: R class indices; None: no class in the label.
        scores: R scores in [0, 1], or None.
        class_names: names by index; where it is None or too short, the index is shown.
        is_crowd: R flags, or None.

    Returns:
        R labels such as ``"person 98%"`` or ``"person|crowd"``; None if there is nothing to say.
    """
    parts: list[list[str]] = []
    if classes is not None:
        names = class_names or ()
        indices = [int(c) for c in classes]
        parts.append([drawn(names[c]) if 0 <= c < len(names) else str(c) for c in indices])
    if scores is not None:
        scores = scores.tolist() if isinstance(scores, torch.Tensor) else scores
        parts.append([f"{float(score):.0%}" for score in scores])
    if not parts:
        return None
    labels = [" ".join(words) for words in zip(*parts, strict=True)]
    if is_crowd is None:
        return labels
    marks = {True: "|crowd", False: ""}
    return [label + marks[bool(crowd)] for label, crowd in zip(labels, is_crowd, strict=True)]


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

    def __init__(self, mask_or_polygons: object, height: int, width: int) -> None:
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
        found: np.ndarray = mask_util.decode(rle)
        return found

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


_THRESHOLD = 0.05  # keypoints of a lower score are not drawn
_Point = tuple[float, float]


def visible_points(keypoints: Any, names: Sequence[str] | None) -> dict[str | int, _Point]:
    """Return x, y of the visible keypoints by name (by index where there are no names)."""
    points: dict[str | int, _Point] = {}
    for index, (x, y, score) in enumerate(keypoints):
        if score > _THRESHOLD and math.isfinite(x) and math.isfinite(y):
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


_BOX_ALPHA = 0.9  # a half-transparent thin line gets lost


class ColorMode(Enum):
    """How colours are chosen."""

    IMAGE = 0
    """Every instance its own colour, over the image."""
    SEGMENTATION = 1
    """Instances of a class in similar colours, from the metadata's thing"""
    IMAGE_BW = 2
    """As IMAGE, and what no mask covers is grey."""


class InstanceDrawing(DrawingBase):
    """Draws R instances: boxes, masks, skeletons, labels.

    Args:
        img_rgb: (H, W, 3) RGB in [0, 255].
        metadata: names and colours, with a method ``get(name, default)``; or None.
        scale: size of the output relative to the image.
        instance_mode: see `ColorMode`.
        font_size_scale: factor on the size of the text.
    """

    def __init__(
        self,
        img_rgb: object,
        metadata: object = None,
        scale: float = 1.0,
        instance_mode: ColorMode = ColorMode.IMAGE,
        font_size_scale: float = 1.0,
    ) -> None:
        super().__init__(img_rgb, scale, font_size_scale)
        self.metadata: Any = {} if metadata is None else metadata
        self._instance_mode = instance_mode
        self._color_uses: dict[Any, int] = {}

    def overlay_instances(
        self,
        *,
        boxes: object = None,
        labels: Sequence[str] | None = None,
        masks: object = None,
        keypoints: object = None,
        assigned_colors: Sequence[Any] | None = None,
        alpha: float = 0.5,
    ) -> VisImage:
        """Draw R instances, large ones first, all labels on top.

        A box that is not finite is left out with its label; the mask of its instance is drawn.

        Args:
            boxes: `Boxes`, `RotatedBoxes` or (R, 4) XYXY or (R, 5) rotated.
            labels: R texts.
            masks: `BitMasks`, `PolygonMasks`, (R, H, W), or a list of what `GenericMask` takes;
                None or [] for an instance without a mask.
            keypoints: `Keypoints` or (R, K, 3): x, y, score or visibility.
            assigned_colors: R colours; default R different ones.
            alpha: opacity of the masks in [0, 1].

        Raises:
            ValueError: the inputs are of different lengths.
        """
        rows = None if boxes is None else self._convert_boxes(boxes)
        shapes = None if masks is None else self._convert_masks(masks, boxes)
        points = None if keypoints is None else self._convert_keypoints(keypoints)
        count = _common_length(
            boxes=rows, labels=labels, masks=shapes, keypoints=points, colors=assigned_colors
        )
        if count == 0:
            return self.output
        colors = assigned_colors or [palette(index) for index in range(count)]
        if rows is not None and rows.shape[1] == 5:
            return self.overlay_rotated_instances(rows, labels, colors)
        extents = self._extents(shapes, points, count) if rows is None else rows
        with np.errstate(invalid="ignore", over="ignore"):  # boxes that are not finite
            areas = np.prod(extents[:, 2:] - extents[:, :2], axis=1)
        order = np.argsort(-np.nan_to_num(areas), kind="stable").tolist()
        for index in order:
            if shapes is not None:
                self._fill_shape(shapes[index], colors[index], alpha)
            if rows is not None:
                self.draw_box(rows[index], alpha=_BOX_ALPHA, edge_color=colors[index])
        for person in () if points is None else points:
            self.draw_and_connect_keypoints(person)
        for index in reversed(order) if labels is not None else ():
            text = (labels or ())[index]
            if rows is None and shapes is not None:
                self._draw_text_in_mask(shapes[index].mask, text, colors[index])
            else:
                self._draw_label(text, colors[index], extents[index])
        return self.output

    def _fill_shape(self, shape: GenericMask, color: ColorLike, alpha: float) -> None:
        """Fill the pixels of a mask; its polygons, where a subclass draws these by itself."""
        if type(self).draw_polygon is DrawingBase.draw_polygon:
            self._fill_mask(shape.mask, color, None, alpha)
            return
        for outline in shape.polygons:
            self.draw_polygon(np.asarray(outline).reshape(-1, 2), color, alpha=alpha)

    def overlay_rotated_instances(
        self,
        boxes: object = None,
        labels: Sequence[str] | None = None,
        assigned_colors: Sequence[Any] | None = None,
    ) -> VisImage:
        """Draw R rotated boxes, large ones first.

        Args:
            boxes: `RotatedBoxes` or (R, 5): centre x, centre y, width, height, degrees.
            labels: R texts.
            assigned_colors: R colours; default R different ones.
        """
        rows = self._convert_boxes(boxes) if boxes is not None else np.zeros((0, 5))
        if assigned_colors is None:
            assigned_colors = [palette(index) for index in range(len(rows))]
        areas = np.nan_to_num(rows[:, 2] * rows[:, 3])
        for index in np.argsort(-areas, kind="stable").tolist():
            self.draw_rotated_box_with_label(
                rows[index],
                alpha=_BOX_ALPHA,
                edge_color=assigned_colors[index],
                label=labels[index] if labels is not None else None,
            )
        return self.output

    def draw_and_connect_keypoints(self, keypoints: object) -> VisImage:
        """Draw one skeleton, by the metadata's keypoint_names and keypoint_connection_rules.

        Args:
            keypoints: (K, 3): x, y, score; those with a score of at most 0.05 are left out.
        """
        names = self.metadata.get("keypoint_names", None)
        points = visible_points(keypoints, names)
        for first, second, color in self.metadata.get("keypoint_connection_rules", None) or ():
            if first in points and second in points:
                (x0, y0), (x1, y1) = points[first], points[second]
                self.draw_line([x0, x1], [y0, y1], color=color)
        for start, end in spine(points):
            self.draw_line([start[0], end[0]], [start[1], end[1]], color=_RED)
        for point in points.values():
            radius = (1.8 * self._line_width + 1) / self.output.scale
            self.draw_circle(point, color=_RED, radius=radius)
        return self.output

    # --------------------------------------------------------------- conversions
    def _class_colors(
        self, classes: Sequence[int] | None, jittering: bool, always: bool = False
    ) -> list[Any] | None:
        """Return the metadata's colours by instance in SEGMENTATION mode (or `always`), or None."""
        colors = self.metadata.get("thing_colors", None)
        if not colors or classes is None:
            return None
        if not always and self._instance_mode != ColorMode.SEGMENTATION:
            return None
        self._color_uses = {}
        bases = [[channel / 255 for channel in colors[index]] for index in classes]
        return [self._jitter(base) if jittering else to_rgb(base) for base in bases]

    def _jitter(self, color: ColorLike) -> ColorLike:
        """Vary the colour of a class a little from one instance to the next; user classes override.

        Args:
            color: see `overlay_instances`; the first use of it in a picture is left as it is.
        """
        key = tuple(color)
        number = self._color_uses.get(key, 0)
        self._color_uses[key] = number + 1
        hue, lightness, saturation = colorsys.rgb_to_hls(*to_rgb(color))
        steps = ((number * _GOLDEN) % 1.0, (number * _GOLDEN * _GOLDEN) % 1.0)
        shift = [2 * s - 1 if number else 0.0 for s in steps]
        lightness = min(max(lightness + 0.14 * shift[0], 0.1), 0.9)
        return colorsys.hls_to_rgb((hue + 0.03 * shift[1]) % 1.0, lightness, saturation)

    def _change_color_brightness(self, color: ColorLike, brightness_factor: float) -> ColorLike:
        """Return a lighter or darker colour; user classes call it.

        Args:
            color: a name or three numbers in [0, 1].
            brightness_factor: in [-1, 1]; below 0 darker.
        """
        return change_brightness(color, brightness_factor)

    def _stuff_color(self, index: int) -> ColorLike:
        colors = self.metadata.get("stuff_colors", None)
        if not colors or index >= len(colors):
            return change_brightness(palette(index + 7), -0.35)
        return [channel / 255 for channel in colors[index]]

    @staticmethod
    def _convert_boxes(boxes: object) -> np.ndarray:
        """Return boxes as (R, 4) XYXY or (R, 5) array."""
        if isinstance(boxes, Boxes | RotatedBoxes):
            boxes = boxes.tensor
        if isinstance(boxes, torch.Tensor):
            boxes = boxes.detach().cpu().numpy()
        array = np.asarray(boxes, dtype=np.float64)
        return array if array.ndim == 2 else array.reshape(-1, 4)

    def _convert_masks(self, masks_or_polygons: Any, boxes: Any = None) -> list[GenericMask]:
        """Return masks of any form as `GenericMask`; `ROIMasks` are pasted into `boxes`."""
        masks, height, width = masks_or_polygons, self.output.height, self.output.width
        if hasattr(masks, "to_bitmasks"):
            masks = masks.to_bitmasks(boxes, height, width, 0.5)
        if isinstance(masks, BitMasks):
            masks = masks.tensor
        elif hasattr(masks, "polygons") and not isinstance(masks, list):
            masks = masks.polygons
        if isinstance(masks, torch.Tensor):
            masks = masks.detach().cpu().numpy()
        return [
            m if isinstance(m, GenericMask) else GenericMask([] if m is None else m, height, width)
            for m in masks
        ]

    @staticmethod
    def _convert_keypoints(keypoints: object) -> np.ndarray:
        """Return keypoints as (R, K, 3) array."""
        if isinstance(keypoints, Keypoints):
            keypoints = keypoints.tensor
        if isinstance(keypoints, torch.Tensor):
            keypoints = keypoints.detach().cpu().numpy()
        return np.asarray(keypoints, dtype=np.float64)

    @staticmethod
    def _extents(
        masks: Sequence[GenericMask] | None, keypoints: np.ndarray | None, count: int
    ) -> np.ndarray:
        """Return the (R, 4) tight boxes of masks or visible keypoints."""
        if masks is not None:
            return np.stack([mask.bbox() for mask in masks])
        result = np.zeros((count, 4))
        for row, person in zip(result, keypoints if keypoints is not None else (), strict=False):
            seen = person[(person[:, 2] > 0) & np.isfinite(person).all(axis=1), :2]
            if len(seen):
                row[:] = (*seen.min(axis=0), *seen.max(axis=0))
        return result

    def _overlay_predictions(
        self,
        fields: Mapping[str, Any],
        masks: list[GenericMask] | None,
        labels: Sequence[str] | None,
        colors: Sequence[Any] | None,
        alpha: float,
    ) -> VisImage:
        """Draw predictions on the image, which loses its colours around them in `IMAGE_BW`.

        Args:
            fields: of the predictions; boxes and keypoints are taken from them.
            masks: theirs, converted.
            labels: their texts.
            colors: their colours; None: one each.
            alpha: opacity; 0.3 in `ColorMode.IMAGE_BW`.
        """
        if self._instance_mode == ColorMode.IMAGE_BW:
            covered = np.any(np.stack([m.mask for m in masks]), axis=0) if masks else None
            self.output.reset_image(self._create_grayscale_image(covered))
            alpha = 0.3
        return self.overlay_instances(
            boxes=fields.get("pred_boxes"),
            labels=labels,
            masks=masks,
            keypoints=fields.get("pred_keypoints"),
            assigned_colors=colors,
            alpha=alpha,
        )

    def _prediction_parts(
        self, fields: Mapping[str, Any]
    ) -> tuple[list[int] | None, list[str] | None, list[GenericMask] | None]:
        """Return classes, labels and masks of predictions; None for what they do not have."""
        classes = fields["pred_classes"].tolist() if "pred_classes" in fields else None
        names = self.metadata.get("thing_classes", None)
        labels = create_text_labels(classes, fields.get("scores"), names)
        masks = None
        if "pred_masks" in fields:
            masks = self._convert_masks(fields["pred_masks"], fields.get("pred_boxes"))
        return classes, labels, masks

    def _create_grayscale_image(self, mask: np.ndarray | None = None) -> np.ndarray:
        """Return the image in grey, with its colours where `mask` (H, W) is set."""
        grey = self.img.astype(np.float32).mean(axis=2, keepdims=True).round().astype(np.uint8)
        coloured = np.asarray(False if mask is None else mask.astype(bool)[..., None])
        return np.where(coloured, self.img, grey)


def _common_length(**inputs: Sized | None) -> int:
    """Return the length that all inputs which are not None share; 0 where there is none."""
    lengths = {name: len(value) for name, value in inputs.items() if value is not None}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"All inputs must have one entry per instance, got {lengths}")
    return next(iter(lengths.values()), 0)
