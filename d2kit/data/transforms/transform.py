"""Deterministic transforms of images, coordinates and segmentations.

The base classes and the simple transforms are fvcore's, so that user code which subclasses them
or asks `isinstance` keeps working; what Detectron2 adds is written here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from fvcore.transforms import transform as fvcore_transform
from fvcore.transforms.transform import (
    BlendTransform,
    GridSampleTransform,
    HFlipTransform,
    NoOpTransform,
    ScaleTransform,
    Transform,
    TransformList,
    VFlipTransform,
)

__all__ = [
    "BlendTransform",
    "ColorTransform",
    "CropTransform",
    "ExtentTransform",
    "GridSampleTransform",
    "HFlipTransform",
    "NoOpTransform",
    "PILColorTransform",
    "PadTransform",
    "ResizeTransform",
    "RotationTransform",
    "ScaleTransform",
    "Transform",
    "TransformList",
    "VFlipTransform",
]


_MIN_AREA = 1e-9  # square pixels


class CropTransform(fvcore_transform.CropTransform):
    """Crop to a window; fvcore's, with polygons clipped here instead of by shapely.

    Args:
        x0: left edge of the window, pixels.
        y0: upper edge.
        w: width of the window.
        h: height of the window.
        orig_w: width of the image before cropping; only the inverse needs it.
        orig_h: height of the image before cropping.
    """

    def apply_polygons(self, polygons: list[np.ndarray]) -> list[np.ndarray]:
        """Crop polygons, each (P, 2); one may vanish, or fall into several parts."""
        window = (self.x0, self.y0, self.x0 + self.w, self.y0 + self.h)
        parts = [part for p in polygons for part in clip_polygon_to_rect(p, *window)]
        return [part - (self.x0, self.y0) for part in parts]

    def inverse(self) -> PadTransform:
        """Return the padding to the former size.

        Raises:
            ValueError: where the former size was not given.
        """
        if self.orig_w is None or self.orig_h is None:
            raise ValueError("CropTransform has an inverse only if made with orig_w and orig_h")
        right, bottom = self.orig_w - self.x0 - self.w, self.orig_h - self.y0 - self.h
        return PadTransform(self.x0, self.y0, right, bottom, orig_w=self.w, orig_h=self.h)


class PadTransform(fvcore_transform.PadTransform):
    """Add a border; fvcore's, with an inverse that crops polygons without shapely.

    Args:
        x0: columns added at the left, pixels.
        y0: rows added at the top.
        x1: columns added at the right.
        y1: rows added at the bottom.
        orig_w: width of the image before padding; only the inverse needs it.
        orig_h: height of the image before padding.
        pad_value: value of the border in images.
        seg_pad_value: value of the border in segmentations.
    """

    def inverse(self) -> CropTransform:
        """Return the crop to the former size.

        Raises:
            ValueError: where the former size was not given.
        """
        if self.orig_w is None or self.orig_h is None:
            raise ValueError("PadTransform has an inverse only if made with orig_w and orig_h")
        width, height = self.orig_w + self.x0 + self.x1, self.orig_h + self.y0 + self.y1
        return CropTransform(self.x0, self.y0, self.orig_w, self.orig_h, width, height)


def clip_polygon_to_rect(
    polygon: np.ndarray, x0: float, y0: float, x1: float, y1: float
) -> list[np.ndarray]:
    """Intersect a polygon with a rectangle; a concave polygon may fall into several parts.

    Args:
        polygon: (P, 2) floating point vertices (x, y), in order, not closed.
        x0: left edge of the rectangle, in the polygon's coordinates.
        y0: upper edge.
        x1: right edge.
        y1: lower edge.

    Returns:
        The parts, each a (Q, 2) float64 array with Q >= 3; empty where nothing is left. Parts
        without area are dropped. A polygon that crosses itself keeps its area but is not split.
    """
    points = np.asarray(polygon, dtype=np.float64).reshape(-1, 2)
    if len(points) < 3:
        return []
    parts = [points]
    for axis, sign, limit in ((0, 1.0, x0), (0, -1.0, x1), (1, 1.0, y0), (1, -1.0, y1)):
        parts = [piece for part in parts for piece in _clip_half_plane(part, axis, sign, limit)]
    return [part for part in parts if len(part) >= 3 and abs(_signed_area(part)) > _MIN_AREA]


def _signed_area(points: np.ndarray) -> float:
    """Return the shoelace area of (P, 2) `points`, in square pixels."""
    x, y = (points - points[0]).T
    return 0.5 * float(x @ np.roll(y, -1) - y @ np.roll(x, -1))


def _clip_half_plane(points: np.ndarray, axis: int, sign: float, limit: float) -> list[np.ndarray]:
    """Keep of `points` what satisfies ``sign * (coordinate - limit) >= 0`` along `axis`.

    The line cuts the outline into chains that lie inside. Along the line, inside and outside of
    a simple polygon alternate, so that the sorted crossings pair up into the segments which close
    the chains again.
    """
    distance = sign * (points[:, axis] - limit)
    inside = distance >= 0
    if inside.all():
        return [points]
    if not inside.any():
        return []
    after = np.roll(inside, -1)
    edges = np.flatnonzero(inside != after)
    if inside[edges[0]]:  # start with an edge that enters
        edges = np.roll(edges, -1)
    ends = (edges + 1) % len(points)
    fraction = distance[edges] / (distance[edges] - distance[ends])
    crossings = points[edges] + fraction[:, None] * (points[ends] - points[edges])
    crossings[:, axis] = limit

    chains = []
    for enter in range(0, len(edges), 2):
        count = (edges[enter + 1] - ends[enter]) % len(points) + 1
        members = (ends[enter] + np.arange(count)) % len(points)
        chains.append(
            np.concatenate([crossings[enter, None], points[members], crossings[enter + 1, None]])
        )
    return _close_chains(chains, crossings[:, 1 - axis])


def _close_chains(chains: list[np.ndarray], positions: np.ndarray) -> list[np.ndarray]:
    """Join `chains` along the line; crossing 2k enters and 2k+1 leaves at chain k."""
    pairs = np.argsort(positions, kind="stable").reshape(-1, 2)
    if ((pairs[:, 0] + pairs[:, 1]) % 2 == 0).any():  # the outline crosses itself: keep it whole
        return [np.concatenate(chains)]
    partner = {int(a): int(b) for a, b in pairs} | {int(b): int(a) for a, b in pairs}
    polygons, left = [], set(range(len(chains)))
    while left:
        chain, members = min(left), []
        while chain in left:
            left.remove(chain)
            members.append(chains[chain])
            chain = partner[2 * chain + 1] // 2
        polygons.append(np.concatenate(members))
    return polygons


class RotationTransform(Transform):
    """Rotate about a point, counter-clockwise as seen on the screen.

    Args:
        h: height of the image, pixels.
        w: width of the image.
        angle: degrees.
        expand: whether the result grows so that the whole image is seen.
        center: (x, y) of the fixed point in pixels; the image's centre by default. With `expand`
            it has no influence: the result is centred anyway.
        interp: OpenCV's interpolation flag for images; None means linear. Segmentations use
            nearest.
    """

    def __init__(
        self,
        h: int,
        w: int,
        angle: float,
        expand: bool = True,
        center: tuple[float, float] | None = None,
        interp: int | None = None,
    ) -> None:
        super().__init__()
        self.h, self.w, self.angle, self.expand, self.interp = h, w, angle, expand, interp
        self.image_center = np.array((w / 2, h / 2))
        self.center = (w / 2, h / 2) if center is None else center
        self.bound_w, self.bound_h = w, h
        if expand:
            cos, sin = np.abs((np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))))
            bounds = np.rint((w * cos + h * sin, w * sin + h * cos))
            self.bound_w, self.bound_h = (int(side) for side in bounds)
        self.rm_coords = self.create_rotation_matrix()
        # OpenCV counts from the middle of the first pixel, coordinates from its corner
        self.rm_image = self.create_rotation_matrix(offset=-0.5)

    def create_rotation_matrix(self, offset: float = 0) -> np.ndarray:
        """Return the (2, 3) matrix from source to result points (x, y, 1).

        Args:
            offset: added to both systems' origin; -0.5 for pixel indices, 0 for coordinates.
        """
        theta = np.deg2rad(self.angle)
        linear = np.array([[np.cos(theta), np.sin(theta)], [-np.sin(theta), np.cos(theta)]])
        center = np.asarray(self.center, dtype=np.float64) + offset
        shift = center - linear @ center
        if self.expand:
            source_middle = self.image_center + offset
            result_middle = np.array((self.bound_w / 2, self.bound_h / 2)) + offset
            shift = result_middle - linear @ source_middle
        return np.concatenate([linear, shift[:, None]], axis=1)

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        """Rotate an image of shape (H, W) or (H, W, C); what comes from outside is 0."""
        if img.size == 0 or self.angle % 360 == 0:
            return img
        if img.shape[:2] != (self.h, self.w):
            raise ValueError(
                f"RotationTransform was made for {self.h}x{self.w} pixels (height x width), got an "
                f"array of shape {img.shape}"
            )
        import cv2

        if interp is None:
            interp = cv2.INTER_LINEAR if self.interp is None else self.interp
        source = img.view(np.uint8) if img.dtype == np.bool_ else img
        result = cv2.warpAffine(source, self.rm_image, (self.bound_w, self.bound_h), flags=interp)
        found: np.ndarray = result.reshape(*result.shape[:2], *img.shape[2:]).astype(
            img.dtype, copy=False
        )
        return found

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Rotate (P, 2) points (x, y)."""
        points = np.asarray(coords, dtype=np.float64)
        if self.angle % 360 == 0 or points.size == 0:
            return points
        found: np.ndarray = points @ self.rm_coords[:, :2].T + self.rm_coords[:, 2]
        return found

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Rotate a label map or mask (H, W) by nearest neighbour."""
        import cv2

        return self.apply_image(segmentation, interp=cv2.INTER_NEAREST)

    def inverse(self) -> Transform:
        """Return the transform that rotates back and crops to the former size.

        Raises:
            NotImplementedError: without `expand`, because corners were lost.
        """
        if not self.expand:
            raise NotImplementedError("a rotation with expand=False cuts corners off: no inverse")
        if self.angle % 360 == 0:
            return NoOpTransform()
        upright = RotationTransform(self.bound_h, self.bound_w, -self.angle, interp=self.interp)
        # each rotation keeps the middle in the middle, so the border is equal on opposite sides
        border = np.subtract((upright.bound_w, upright.bound_h), (self.w, self.h)) // 2
        window = CropTransform(*border.tolist(), self.w, self.h)
        return TransformList([upright, window])


# Pillow's numbers of its resampling filters, so that Pillow is imported only where it is used
PIL_NEAREST, PIL_BILINEAR, PIL_BICUBIC = 0, 2, 3
_TORCH_MODES = {PIL_BILINEAR: "bilinear", PIL_BICUBIC: "bicubic"}


class ExtentTransform(Transform):
    """Cut a rectangle, which may reach beyond the image, and resize it (Pillow's EXTENT).

    Args:
        src_rect: (x0, y0, x1, y1) in the source image, pixels.
        output_size: (h, w) of the result, pixels.
        interp: Pillow's resampling filter for images; segmentations use nearest.
        fill: value of pixels from outside the source image.
    """

    def __init__(
        self, src_rect: object, output_size: object, interp: int = 2, fill: float = 0
    ) -> None:
        super().__init__()
        self._set_attributes(locals())

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        """Transform an image of shape (H, W) or (H, W, C)."""
        from PIL import Image

        height, width = (int(x) for x in self.output_size)
        method = self.interp if interp is None else interp
        rect = tuple(float(x) for x in self.src_rect)

        def extent(plane: np.ndarray) -> np.ndarray:
            result = Image.fromarray(plane).transform(
                (width, height),
                Image.Transform.EXTENT,
                data=rect,
                resample=Image.Resampling(method),
                fillcolor=tuple([self.fill] * 3) if plane.ndim == 3 else self.fill,
            )
            return np.asarray(result)

        return _by_pillow(img, extent)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Transform (P, 2) points (x, y)."""
        x0, y0, x1, y1 = self.src_rect
        height, width = self.output_size
        scale = (width / (x1 - x0), height / (y1 - y0))
        found: np.ndarray = (np.asarray(coords) - (x0, y0)) * scale
        return found

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Transform a label map or mask (H, W) by nearest neighbour."""
        return self.apply_image(segmentation, interp=PIL_NEAREST)


class ResizeTransform(Transform):
    """Resize to a given size.

    Images of dtype uint8 are resized by Pillow, whose antialiased fixed-point result is what
    published figures rest on; other dtypes by torch without antialiasing, like Detectron2's.
    Segmentations of any dtype take the pixel that Pillow's nearest filter takes.

    Args:
        h: height before, pixels.
        w: width before.
        new_h: height after.
        new_w: width after.
        interp: Pillow's resampling filter for images; None means bilinear.
    """

    def __init__(self, h: int, w: int, new_h: int, new_w: int, interp: int | None = None) -> None:
        super().__init__()
        if min(h, w, new_h, new_w) < 1:
            raise ValueError(
                f"ResizeTransform: sizes must be at least 1 pixel, got {h}x{w} -> {new_h}x{new_w} "
                "(height x width)"
            )
        if interp is None:
            interp = PIL_BILINEAR
        self._set_attributes(locals())

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        """Resize an image of shape (H, W) or (H, W, C)."""
        self._check_size(img)
        method = self.interp if interp is None else interp
        if (self.new_h, self.new_w) == img.shape[:2]:
            return img
        if method == PIL_NEAREST:
            return self.apply_segmentation(img)
        if img.dtype != np.uint8:
            return self._resize_by_torch(img, method)
        size = (int(self.new_w), int(self.new_h))

        def resize(plane: np.ndarray) -> np.ndarray:
            from PIL import Image

            return np.asarray(Image.fromarray(plane).resize(size, Image.Resampling(method)))

        return _by_pillow(img, resize)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Scale (P, 2) points (x, y)."""
        found: np.ndarray = np.asarray(coords) * (self.new_w / self.w, self.new_h / self.h)
        return found

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Resize a label map or mask (H, W), any dtype, by nearest neighbour."""
        self._check_size(segmentation)
        if (self.new_h, self.new_w) == segmentation.shape[:2]:
            return segmentation
        rows = nearest_indices(self.h, self.new_h)
        columns = nearest_indices(self.w, self.new_w)
        if self.new_h > self.h:  # the smaller intermediate result is the faster one
            return segmentation.take(columns, axis=1).take(rows, axis=0)
        return segmentation.take(rows, axis=0).take(columns, axis=1)

    def inverse(self) -> ResizeTransform:
        """Return the transform that resizes back."""
        return ResizeTransform(self.new_h, self.new_w, self.h, self.w, self.interp)

    def _check_size(self, img: np.ndarray) -> None:
        if img.ndim not in (2, 3) or img.shape[:2] != (self.h, self.w):
            raise ValueError(
                f"ResizeTransform was made for (H, W) or (H, W, C) arrays of {self.h}x{self.w} "
                f"pixels, got shape {img.shape}; a mask or label map must have its image's size"
            )

    def _resize_by_torch(self, img: np.ndarray, method: int) -> np.ndarray:
        if method not in _TORCH_MODES:
            raise ValueError(
                f"ResizeTransform: {img.dtype} images can be resized with interp 0 (nearest), "
                f"2 (bilinear) or 3 (bicubic), got {method}; convert to uint8 for the others"
            )
        floating = np.issubdtype(img.dtype, np.floating)
        planes = np.ascontiguousarray(img if floating else img.astype(np.float32))
        tensor = torch.from_numpy(planes).reshape(self.h, self.w, -1).permute(2, 0, 1)[None]
        size = (int(self.new_h), int(self.new_w))
        tensor = F.interpolate(tensor, size, mode=_TORCH_MODES[method], align_corners=False)
        result = tensor[0].permute(1, 2, 0).reshape(*size, *img.shape[2:]).numpy()
        return result if floating else _round_to(result, img.dtype)


class ColorTransform(Transform):
    """Change colours by any function of the image; geometry stays.

    Args:
        op: takes an image array (H, W) or (H, W, C) and returns one of the same shape.
    """

    def __init__(self, op: Callable[..., Any]) -> None:
        if not callable(op):
            raise ValueError(f"{type(self).__name__}: op must be callable, got {op!r}")
        super().__init__()
        self._set_attributes(locals())

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Return ``op(img)``."""
        found: np.ndarray = self.op(img)
        return found

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Return `coords` as they are."""
        return coords

    def inverse(self) -> Transform:
        """Return the transform that does nothing: geometry was not changed."""
        return NoOpTransform()

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Return `segmentation` as it is."""
        return segmentation


class PILColorTransform(ColorTransform):
    """Change colours by a function of a Pillow image, e.g. of `PIL.ImageEnhance`.

    Args:
        op: takes a `PIL.Image.Image` and returns one of the same size.
    """

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Return ``op(img)``, with `img` handed over as Pillow image."""
        from PIL import Image

        return np.asarray(self.op(Image.fromarray(img)))


def nearest_indices(old: int, new: int) -> np.ndarray:
    """Return, for each of `new` pixels, the one of `old` pixels that Pillow's nearest takes.

    Pillow adds the step up in float64; adding in the same order makes ties fall alike (multiplying
    instead differs in a third of random sizes).
    """
    steps = np.full(new, old / new)
    steps[0] *= 0.5
    return np.minimum(np.cumsum(steps).astype(np.int64), old - 1)


def _round_to(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Round `values` to the integer type `dtype`, clipped to its range (or to bool)."""
    if dtype == np.bool_:
        return values >= 0.5
    info = np.iinfo(dtype)
    found: np.ndarray = np.clip(np.rint(values), info.min, info.max).astype(dtype)
    return found


def _by_pillow(img: np.ndarray, operation: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Apply a Pillow `operation` to (H, W) or (H, W, C) of any number of channels and dtype.

    Three uint8 channels go as RGB and all else plane by plane, because Pillow would take a fourth
    channel for transparency and multiply by it.
    """
    if img.dtype == np.bool_:
        return _by_pillow(img.view(np.uint8), operation).astype(bool)
    if img.dtype != np.uint8:
        planes = img.astype(np.float32)
    else:
        planes = img
    if img.ndim == 2 or (img.ndim == 3 and img.shape[2] == 3 and img.dtype == np.uint8):
        result = operation(planes)
    elif img.ndim == 3:
        channels = [operation(np.ascontiguousarray(planes[..., c])) for c in range(img.shape[2])]
        result = np.stack(channels, axis=-1)
    else:
        raise ValueError(f"expected an image of shape (H, W) or (H, W, C), got {img.shape}")
    if img.dtype == np.uint8:
        return result
    if np.issubdtype(img.dtype, np.floating):
        return result.astype(img.dtype)
    return _round_to(result, img.dtype)


def _rotated_box_noop(t: Transform, x: np.ndarray) -> np.ndarray:
    return x


def _rotated_box_hflip(transform: HFlipTransform, rotated_boxes: np.ndarray) -> np.ndarray:
    """Mirror (R, 5) XYWHA boxes (degrees, counter-clockwise) left to right."""
    boxes = np.array(rotated_boxes, dtype=np.float64)
    boxes[:, 0] = transform.width - boxes[:, 0]
    boxes[:, 4] = -boxes[:, 4]
    return boxes


def _rotated_box_vflip(transform: VFlipTransform, rotated_boxes: np.ndarray) -> np.ndarray:
    """Mirror (R, 5) XYWHA boxes top to bottom."""
    boxes = np.array(rotated_boxes, dtype=np.float64)
    boxes[:, 1] = transform.height - boxes[:, 1]
    boxes[:, 4] = -boxes[:, 4]
    return boxes


def _rotated_box_resize(transform: ResizeTransform, rotated_boxes: np.ndarray) -> np.ndarray:
    """Scale (R, 5) XYWHA boxes; sides keep their directions' images, right angles may be lost."""
    from d2kit.structures.rotated_boxes import scaled_rotated

    boxes = torch.from_numpy(np.array(rotated_boxes, dtype=np.float64))
    factors = transform.new_w / transform.w, transform.new_h / transform.h
    return scaled_rotated(boxes, *factors).numpy()


def _rotated_box_crop(transform: CropTransform, rotated_boxes: np.ndarray) -> np.ndarray:
    """Move (R, 5) XYWHA boxes into the window's coordinates."""
    return np.asarray(rotated_boxes) - (transform.x0, transform.y0, 0, 0, 0)


def _rotated_box_pad(transform: PadTransform, rotated_boxes: np.ndarray) -> np.ndarray:
    """Move (R, 5) XYWHA boxes by the border at the left and the top."""
    return np.asarray(rotated_boxes) + (transform.x0, transform.y0, 0, 0, 0)


def _rotated_box_rotation(transform: RotationTransform, rotated_boxes: np.ndarray) -> np.ndarray:
    """Turn (R, 5) XYWHA boxes with the image; angles come out in [-180, 180)."""
    boxes = np.array(rotated_boxes, dtype=np.float64)
    boxes[:, :2] = transform.apply_coords(boxes[:, :2])
    boxes[:, 4] = (boxes[:, 4] + transform.angle + 180) % 360 - 180
    return boxes


NoOpTransform.register_type("rotated_box", _rotated_box_noop)
ColorTransform.register_type("rotated_box", _rotated_box_noop)
BlendTransform.register_type("rotated_box", _rotated_box_noop)
HFlipTransform.register_type("rotated_box", _rotated_box_hflip)
VFlipTransform.register_type("rotated_box", _rotated_box_vflip)
ResizeTransform.register_type("rotated_box", _rotated_box_resize)
CropTransform.register_type("rotated_box", _rotated_box_crop)
PadTransform.register_type("rotated_box", _rotated_box_pad)
RotationTransform.register_type("rotated_box", _rotated_box_rotation)
