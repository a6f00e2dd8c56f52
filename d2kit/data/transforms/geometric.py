"""Augmentations that move pixels: flips, resizing, rotation, extent."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from d2kit.data.transforms.augmentation import Augmentation, _transform_to_aug
from d2kit.data.transforms.transform import (
    PIL_BILINEAR,
    ExtentTransform,
    HFlipTransform,
    NoOpTransform,
    ResizeTransform,
    RotationTransform,
    Transform,
    VFlipTransform,
)

SAMPLE_STYLES = ("range", "choice")


def check_sample_style(name: str, sample_style: str) -> None:
    """Raise ValueError unless `sample_style`, given to augmentation `name`, is known."""
    if sample_style not in SAMPLE_STYLES:
        raise ValueError(
            f"{name}: sample_style must be one of {SAMPLE_STYLES}, got {sample_style!r}"
        )


def check_probability(name: str, prob: float) -> None:
    """Raise ValueError unless `prob`, given to augmentation `name`, is in 0..1."""
    if not 0.0 <= prob <= 1.0:
        raise ValueError(f"{name}: prob must be between 0 and 1, got {prob}")


class RandomApply(Augmentation):
    """Apply a transform or augmentation with a given probability.

    Args:
        tfm_or_aug: what to apply.
        prob: probability, 0..1.
    """

    def __init__(self, tfm_or_aug: Augmentation | Transform, prob: float = 0.5) -> None:
        check_probability("RandomApply", prob)
        self.aug = _transform_to_aug(tfm_or_aug)
        self.prob = prob

    def get_transform(self, *args: Any) -> Transform:
        """Return the transform of the wrapped augmentation, or the one that does nothing."""
        if self._rand_range() < self.prob:
            return self.aug.get_transform(*args)
        return NoOpTransform()

    def __call__(self, aug_input: object) -> Transform:
        """Apply the wrapped augmentation to `aug_input` in place, or leave it."""
        if self._rand_range() < self.prob:
            return self.aug(aug_input)
        return NoOpTransform()

    def __repr__(self) -> str:
        return f"RandomApply({self.aug!r}, prob={self.prob})"

    __str__ = __repr__


class RandomFlip(Augmentation):
    """Mirror the image with a given probability.

    Args:
        prob: probability, 0..1.
        horizontal: mirror left to right.
        vertical: mirror top to bottom; exactly one of both must be chosen.
    """

    def __init__(
        self, prob: float = 0.5, *, horizontal: bool = True, vertical: bool = False
    ) -> None:
        check_probability("RandomFlip", prob)
        if horizontal == vertical:
            raise ValueError(
                f"RandomFlip: exactly one of horizontal and vertical must be True, got "
                f"horizontal={horizontal}, vertical={vertical}; use two RandomFlips for both"
            )
        self.prob = prob
        self.horizontal = horizontal
        self.vertical = vertical

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draw whether to flip."""
        height, width = image.shape[:2]
        if self._rand_range() >= self.prob:
            return NoOpTransform()
        return HFlipTransform(width) if self.horizontal else VFlipTransform(height)


class Resize(Augmentation):
    """Resize to a fixed size.

    Args:
        shape: (h, w) in pixels, or one number for both.
        interp: Pillow's resampling filter.
    """

    def __init__(self, shape: int | tuple[int, int], interp: int = PIL_BILINEAR) -> None:
        if isinstance(shape, int):
            shape = (shape, shape)
        if len(shape) != 2 or min(shape) < 1:
            raise ValueError(f"Resize: shape must be (height, width) in pixels, got {shape}")
        self.shape = tuple(shape)
        self.interp = interp

    def get_transform(self, image: np.ndarray) -> Transform:
        """Return the resize of `image` to the fixed size."""
        (height, width), (new_h, new_w) = image.shape[:2], self.shape
        return ResizeTransform(height, width, new_h, new_w, self.interp)


class ResizeShortestEdge(Augmentation):
    """Scale the shorter side to a drawn length, as far as the longer side keeps below a limit.

    Args:
        short_edge_length: pixels; one number, [min, max] with "range", or the lengths to choose
            from with "choice". 0 leaves the image as it is.
        max_size: the most pixels that the longer side may have.
        sample_style: "range" or "choice".
        interp: Pillow's resampling filter.
    """

    def __init__(
        self,
        short_edge_length: int | Sequence[int],
        max_size: int = sys.maxsize,
        sample_style: str = "range",
        interp: int = PIL_BILINEAR,
    ) -> None:
        check_sample_style("ResizeShortestEdge", sample_style)
        self.is_range = sample_style == "range"
        if isinstance(short_edge_length, int):
            short_edge_length = (short_edge_length, short_edge_length)
        lengths = tuple(short_edge_length)
        if not lengths or (self.is_range and (len(lengths) != 2 or lengths[0] > lengths[1])):
            raise ValueError(
                "ResizeShortestEdge: short_edge_length must be [min, max] with sample_style "
                f"'range' and at least one length with 'choice', got {list(lengths)} with "
                f"{sample_style!r}"
            )
        self.short_edge_length = short_edge_length
        self.max_size = max_size
        self.sample_style = sample_style
        self.interp = interp

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draw a length for the shorter side."""
        lengths = self.short_edge_length
        length = int(
            np.random.randint(lengths[0], lengths[1] + 1)
            if self.is_range
            else np.random.choice(lengths)
        )
        if length == 0:
            return NoOpTransform()
        old_h, old_w = image.shape[:2]
        new_h, new_w = self.get_output_shape(old_h, old_w, length, self.max_size)
        return ResizeTransform(old_h, old_w, new_h, new_w, self.interp)

    @staticmethod
    def get_output_shape(
        oldh: int, oldw: int, short_edge_length: int, max_size: int
    ) -> tuple[int, int]:
        """Return the size that an image of the given size is scaled to.

        Args:
            oldh: height before, pixels.
            oldw: width before.
            short_edge_length: wanted length of the shorter side.
            max_size: the most that the longer side may have.

        Returns:
            (height, width) after, rounded to whole pixels, at least 1.
        """
        scale = short_edge_length / min(oldh, oldw)
        longer = max(oldh, oldw) * scale
        # the second factor is applied to the scaled sides, not merged into `scale`: the rounding
        # of half pixels depends on it
        shrink = max_size / longer if longer > max_size else 1.0
        new_h, new_w = (
            short_edge_length if side == min(oldh, oldw) else side * scale for side in (oldh, oldw)
        )
        return max(int(new_h * shrink + 0.5), 1), max(int(new_w * shrink + 0.5), 1)


class ResizeScale(Augmentation):
    """Scale to a random multiple of a target size, aspect ratio kept (large-scale jittering).

    The result is as large as fits into ``scale * (target_height, target_width)``.

    Args:
        min_scale: least multiple.
        max_scale: greatest multiple.
        target_height: pixels.
        target_width: pixels.
        interp: Pillow's resampling filter.

    Source: Ghiasi et al., Simple Copy-Paste is a Strong Data Augmentation Method, 2021, section 3.
    """

    def __init__(
        self,
        min_scale: float,
        max_scale: float,
        target_height: int,
        target_width: int,
        interp: int = PIL_BILINEAR,
    ) -> None:
        if not 0 < min_scale <= max_scale:
            raise ValueError(
                f"ResizeScale: need 0 < min_scale <= max_scale, got {min_scale} and {max_scale}"
            )
        self.min_scale = min_scale
        self.max_scale = max_scale
        self.target_height = target_height
        self.target_width = target_width
        self.interp = interp

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draw the scale."""
        return self._get_resize(image, np.random.uniform(self.min_scale, self.max_scale))

    def _get_resize(self, image: np.ndarray, scale: float) -> Transform:
        size = np.array(image.shape[:2])
        ratio = np.min(np.array((self.target_height, self.target_width)) * scale / size)
        new_h, new_w = (max(int(side), 1) for side in np.round(size * ratio))
        return ResizeTransform(int(size[0]), int(size[1]), new_h, new_w, self.interp)


class RandomResize(Augmentation):
    """Resize to one of several sizes.

    Args:
        shape_list: sizes (h, w), pixels.
        interp: Pillow's resampling filter.
    """

    def __init__(self, shape_list: Sequence[tuple[int, int]], interp: int = PIL_BILINEAR) -> None:
        if len(shape_list) == 0:
            raise ValueError("RandomResize: shape_list must hold at least one (height, width)")
        self.shape_list = shape_list
        self.interp = interp

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draw one of the sizes."""
        new_h, new_w = self.shape_list[np.random.choice(len(self.shape_list))]
        height, width = image.shape[:2]
        return ResizeTransform(height, width, new_h, new_w, self.interp)


class RandomRotation(Augmentation):
    """Rotate by a random angle, about a random point if wanted.

    Args:
        angle: degrees, counter-clockwise; [min, max] with "range", the angles to choose from with
            "choice", or one number.
        expand: whether the result grows so that the whole image is seen.
        center: points (x, y) relative to the image's size (0..1): [[min x, min y],
            [max x, max y]] with "range", or those to choose from with "choice"; None is the
            image's centre. Without influence if `expand`.
        sample_style: "range" or "choice".
        interp: OpenCV's interpolation flag; None means linear.
    """

    def __init__(
        self,
        angle: float | Sequence[float],
        expand: bool = True,
        center: Sequence[Any] | None = None,
        sample_style: str = "range",
        interp: int | None = None,
    ) -> None:
        check_sample_style("RandomRotation", sample_style)
        self.is_range = sample_style == "range"
        if isinstance(angle, (int, float)):
            angle = (angle, angle)
        if center is not None and isinstance(center[0], (int, float)):
            center = (center, center)
        if self.is_range and (len(angle) != 2 or (center is not None and len(center) != 2)):
            raise ValueError(
                "RandomRotation: sample_style 'range' needs angle [min, max] and center "
                f"[[min x, min y], [max x, max y]] or None, got {angle} and {center}"
            )
        self.angle = angle
        self.expand = expand
        self.center = center
        self.sample_style = sample_style
        self.interp = interp

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draw angle and centre."""
        height, width = image.shape[:2]
        angle = float(self._draw(self.angle))
        center: tuple[float, float] | None = None
        if self.center is not None:
            share_x, share_y = self._draw(self.center)
            center = (width * float(share_x), height * float(share_y))
        if angle % 360 == 0:
            return NoOpTransform()
        return RotationTransform(
            height, width, angle, expand=self.expand, center=center, interp=self.interp
        )

    def _draw(self, options: Sequence[Any]) -> Any:
        """Draw between the two `options`, each coordinate by itself, or one of them."""
        if not self.is_range:
            return options[np.random.choice(len(options))]
        low, high = np.asarray(options, dtype=np.float64)
        return np.random.uniform(low, high)


class RandomExtent(Augmentation):
    """Cut a rectangle of random size and place, which may reach beyond the image.

    Args:
        scale_range: (min, max) of the rectangle's sides relative to the image's.
        shift_range: (x, y): the rectangle's centre moves by at most half of this share of the
            image's width and height, to either side.
    """

    def __init__(self, scale_range: tuple[float, float], shift_range: tuple[float, float]) -> None:
        self.scale_range = scale_range
        self.shift_range = shift_range

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draw size and place of the rectangle."""
        height, width = image.shape[:2]
        scale = np.random.uniform(self.scale_range[0], self.scale_range[1])
        x = width * (0.5 + self.shift_range[0] * (np.random.rand() - 0.5))
        y = height * (0.5 + self.shift_range[1] * (np.random.rand() - 0.5))
        half_w, half_h = 0.5 * scale * width, 0.5 * scale * height
        rect = (x - half_w, y - half_h, x + half_w, y + half_h)
        return ExtentTransform(
            src_rect=tuple(float(v) for v in rect),
            output_size=(max(int(rect[3] - rect[1]), 1), max(int(rect[2] - rect[0]), 1)),
        )


class FloatResizeTransform(ResizeTransform):
    """Resizes images as float32, which is done bilinearly without antialiasing.

    Args:
        h: see `ResizeTransform`, as the others.
        w: see there.
        new_h: see there.
        new_w: see there.
        interp: see there.
    """

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        """Resize an image of shape (H, W) or (H, W, C); the result is float32."""
        return super().apply_image(np.asarray(img, dtype=np.float32), interp)


class TorchvisionResize(ResizeShortestEdge):
    """`ResizeShortestEdge` whose pixels and sides are those of torchvision's detectors.

    Args:
        short_edge_length: see `ResizeShortestEdge`, as the others.
        max_size: see there.
        sample_style: see there.
        interp: see there.
    """

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draw a length for the shorter side."""
        drawn = super().get_transform(image)
        if isinstance(drawn, NoOpTransform):
            return drawn
        return FloatResizeTransform(drawn.h, drawn.w, drawn.new_h, drawn.new_w, self.interp)

    @staticmethod
    def get_output_shape(
        oldh: int, oldw: int, short_edge_length: int, max_size: int
    ) -> tuple[int, int]:
        """See `ResizeShortestEdge.get_output_shape`; both sides are rounded down."""
        scale = min(short_edge_length / min(oldh, oldw), max_size / max(oldh, oldw))
        return max(int(oldh * scale), 1), max(int(oldw * scale), 1)
