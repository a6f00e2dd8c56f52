"""The augmentations that the library brings along."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from d2kit.data.transforms.augmentation import Augmentation
from d2kit.data.transforms.geometric import (
    RandomApply,
    RandomExtent,
    RandomFlip,
    RandomResize,
    RandomRotation,
    Resize,
    ResizeScale,
    ResizeShortestEdge,
)
from d2kit.data.transforms.transform import (
    BlendTransform,
    CropTransform,
    NoOpTransform,
    PadTransform,
    Transform,
    TransformList,
)

__all__ = [
    "FixedSizeCrop",
    "MinIoURandomCrop",
    "RandomApply",
    "RandomBrightness",
    "RandomContrast",
    "RandomCrop",
    "RandomCrop_CategoryAreaConstraint",
    "RandomExtent",
    "RandomFlip",
    "RandomLighting",
    "RandomResize",
    "RandomRotation",
    "RandomSaturation",
    "Resize",
    "ResizeScale",
    "ResizeShortestEdge",
]


_CROP_TRIALS = 10
CROP_TYPES = ("relative_range", "relative", "absolute", "absolute_range")


class RandomCrop(Augmentation):
    """Crop a window of given or random size at a random place.

    Args:
        crop_type: what `crop_size` means: "relative", shares (h, w) of the image; "relative_range",
            shares drawn from [h, 1] and [w, 1]; "absolute", pixels (h, w), at most the image's;
            "absolute_range", height and width each drawn from [min, max] pixels.
        crop_size: two numbers.
    """

    def __init__(self, crop_type: str, crop_size: Sequence[float]) -> None:
        if crop_type not in CROP_TYPES:
            raise ValueError(
                f"RandomCrop: crop_type must be one of {CROP_TYPES}, got {crop_type!r}"
            )
        if len(crop_size) != 2 or min(crop_size) <= 0:
            raise ValueError(f"RandomCrop: crop_size must be two positive numbers, got {crop_size}")
        if crop_type.startswith("relative") and max(crop_size) > 1:
            raise ValueError(
                f"RandomCrop: crop_size of type {crop_type!r} is a share of the image, at most 1, "
                f"got {crop_size}; use 'absolute' for pixels"
            )
        if crop_type == "absolute_range" and crop_size[0] > crop_size[1]:
            raise ValueError(f"RandomCrop: 'absolute_range' is [min, max], got {crop_size}")
        self.crop_type = crop_type
        self.crop_size = crop_size

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draw size and place of the window."""
        height, width = image.shape[:2]
        crop_h, crop_w = self.get_crop_size((height, width))
        if crop_h > height or crop_w > width:
            raise ValueError(f"crop of {crop_h}x{crop_w} does not fit an image {height}x{width}")
        y0 = int(np.random.randint(height - crop_h + 1))
        x0 = int(np.random.randint(width - crop_w + 1))
        return CropTransform(x0, y0, crop_w, crop_h, orig_w=width, orig_h=height)

    def get_crop_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Return, or draw, the size of the window.

        Args:
            image_size: (h, w), pixels.

        Returns:
            (h, w) of the window, pixels, at least 1.
        """
        height, width = image_size
        first, second = self.crop_size
        if self.crop_type == "absolute":
            return min(int(first), height), min(int(second), width)
        if self.crop_type == "absolute_range":
            low, high = int(first), int(second)
            return (
                int(np.random.randint(min(height, low), min(height, high) + 1)),
                int(np.random.randint(min(width, low), min(width, high) + 1)),
            )
        share: np.ndarray = np.asarray(self.crop_size, dtype=np.float32)
        if self.crop_type == "relative_range":
            share = share + np.random.rand(2) * (1 - share)
        return max(int(height * share[0] + 0.5), 1), max(int(width * share[1] + 0.5), 1)


class FixedSizeCrop(Augmentation):
    """Crop to a fixed size at a random place, and pad what is smaller at the right and below.

    Args:
        crop_size: (h, w), pixels.
        pad: whether to pad images that are smaller.
        pad_value: value of the border in images.
        seg_pad_value: value of the border in segmentations.
    """

    def __init__(
        self,
        crop_size: tuple[int, int],
        pad: bool = True,
        pad_value: float = 128.0,
        seg_pad_value: int = 255,
    ) -> None:
        if len(crop_size) != 2 or min(crop_size) < 1:
            raise ValueError(f"FixedSizeCrop: crop_size must be (height, width), got {crop_size}")
        self.crop_size = crop_size
        self.pad = pad
        self.pad_value = pad_value
        self.seg_pad_value = seg_pad_value

    def get_transform(self, image: np.ndarray) -> TransformList:
        """Draw the place."""
        transforms: list[Transform] = [self._get_crop(image)]
        if self.pad:
            transforms.append(self._get_pad(image))
        return TransformList(transforms)

    def _get_crop(self, image: np.ndarray) -> CropTransform:
        height, width = image.shape[:2]
        crop_h, crop_w = min(self.crop_size[0], height), min(self.crop_size[1], width)
        share = np.random.uniform(0.0, 1.0)  # one draw for both axes, like Detectron2
        y0, x0 = (int(v) for v in np.round(np.array((height - crop_h, width - crop_w)) * share))
        return CropTransform(x0, y0, crop_w, crop_h, width, height)

    def _get_pad(self, image: np.ndarray) -> PadTransform:
        height, width = np.minimum(image.shape[:2], self.crop_size).tolist()
        below, right = self.crop_size[0] - height, self.crop_size[1] - width
        return PadTransform(0, 0, right, below, width, height, self.pad_value, self.seg_pad_value)


class RandomCrop_CategoryAreaConstraint(Augmentation):  # noqa: N801  (Detectron2's name)
    """Crop like `RandomCrop`, avoiding windows that one category fills.

    Ten windows are tried; the last one is taken where all are filled.

    Args:
        crop_type: as in `RandomCrop`.
        crop_size: as in `RandomCrop`.
        single_category_max_area: the largest share (0..1) of the window's labelled pixels that
            one category may have; 1 accepts every window.
        ignored_category: label that does not count.
    """

    def __init__(
        self,
        crop_type: str,
        crop_size: Sequence[float],
        single_category_max_area: float = 1.0,
        ignored_category: int | None = None,
    ) -> None:
        self.crop_aug = RandomCrop(crop_type, crop_size)
        self.crop_type = crop_type
        self.crop_size = crop_size
        self.single_category_max_area = single_category_max_area
        self.ignored_category = ignored_category

    def get_transform(self, image: np.ndarray, sem_seg: np.ndarray) -> Transform:
        """Draw size and place of the window."""
        if self.single_category_max_area >= 1.0:
            return self.crop_aug.get_transform(image)
        if sem_seg is None:
            raise ValueError(
                "RandomCrop_CategoryAreaConstraint needs sem_seg, but the input has none"
            )
        crop = self.crop_aug.get_transform(sem_seg)
        for _ in range(_CROP_TRIALS - 1):
            if self._is_mixed(crop.apply_segmentation(sem_seg)):
                break
            crop = self.crop_aug.get_transform(sem_seg)
        return crop

    def _is_mixed(self, labels: np.ndarray) -> bool:
        """Tell whether several categories are there, none of them with too large a share."""
        pixels = dict(zip(*np.unique(labels, return_counts=True), strict=True))
        pixels.pop(self.ignored_category, None)
        limit = self.single_category_max_area * sum(pixels.values())
        return len(pixels) > 1 and max(pixels.values()) < limit


class MinIoURandomCrop(Augmentation):
    """Crop a window that overlaps every box by a drawn least IoU, and holds a box's centre.

    Args:
        min_ious: the least IoUs to draw from; 1 (no crop) and 0 (any window) are added.
        min_crop_size: least side of the window relative to the image's.
        mode_trials: how many least IoUs are drawn before giving up.
        crop_trials: how many windows are tried for each.

    Source: Liu et al., SSD: Single Shot MultiBox Detector, 2016, section 2.2 (data augmentation).
    """

    def __init__(
        self,
        min_ious: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
        min_crop_size: float = 0.3,
        mode_trials: int = 1000,
        crop_trials: int = 50,
    ) -> None:
        self.sample_mode = (1, *min_ious, 0)
        self.min_ious = min_ious
        self.min_crop_size = min_crop_size
        self.mode_trials = mode_trials
        self.crop_trials = crop_trials

    def get_transform(self, image: np.ndarray, boxes: np.ndarray | None) -> Transform:
        """Draw the window; the image stays whole where none is found or there are no boxes."""
        height, width = image.shape[:2]
        if boxes is None:
            return NoOpTransform()
        boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
        for _ in range(self.mode_trials if len(boxes) else 0):
            min_iou = np.random.choice(self.sample_mode)
            if min_iou == 1:
                break
            for _ in range(self.crop_trials):
                window = self._draw_window(height, width)
                if window is not None and _window_fits(window, boxes, min_iou):
                    x0, y0, x1, y1 = window.tolist()
                    return CropTransform(x0, y0, x1 - x0, y1 - y0, orig_w=width, orig_h=height)
        return NoOpTransform()

    def _draw_window(self, height: int, width: int) -> np.ndarray | None:
        """Draw an XYXY window in whole pixels; None if it is too long or empty."""
        new_w = np.random.uniform(self.min_crop_size * width, width)
        new_h = np.random.uniform(self.min_crop_size * height, height)
        if not 0.5 <= new_h / new_w <= 2:
            return None
        x0 = np.random.uniform(width - new_w)
        y0 = np.random.uniform(height - new_h)
        window = np.array((x0, y0, x0 + new_w, y0 + new_h)).astype(np.int64)
        return window if (window[2:] > window[:2]).all() else None


def _window_fits(window: np.ndarray, boxes: np.ndarray, min_iou: float) -> bool:
    """Tell whether `window` has IoU >= `min_iou` with all (R, 4) boxes and holds a centre."""
    sides = np.minimum(boxes[:, 2:], window[2:]) - np.maximum(boxes[:, :2], window[:2])
    overlap = sides.clip(min=0).prod(axis=1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    iou = overlap / (areas + (window[2:] - window[:2]).prod() - overlap)
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    inside = ((centers > window[:2]) & (centers < window[2:])).all(axis=1)
    return bool(iou.min() >= min_iou and inside.any())


# ITU-R BT.601 luma of (R, G, B)
_LUMA = np.array((0.299, 0.587, 0.114))


class _RandomIntensity(Augmentation):
    """Blend with another image; the weight of the given image is drawn from a range.

    Args:
        intensity_min: least weight; below 1 weakens.
        intensity_max: greatest weight; above 1 strengthens.
    """

    def __init__(self, intensity_min: float, intensity_max: float) -> None:
        if intensity_min > intensity_max:
            raise ValueError(
                f"{type(self).__name__}: intensity_min {intensity_min} exceeds intensity_max "
                f"{intensity_max}"
            )
        self.intensity_min = intensity_min
        self.intensity_max = intensity_max

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draw the weight."""
        weight = np.random.uniform(self.intensity_min, self.intensity_max)
        other = self._other_image(image)
        return BlendTransform(src_image=other, src_weight=1 - weight, dst_weight=weight)

    def _other_image(self, image: np.ndarray) -> np.ndarray:
        raise NotImplementedError


class RandomContrast(_RandomIntensity):
    """Change contrast: blend with the image's mean.

    Args:
        intensity_min: least contrast; 0 is uniform grey, 1 the given image.
        intensity_max: greatest contrast.
    """

    def _other_image(self, image: np.ndarray) -> np.ndarray:
        found: np.ndarray = image.mean()
        return found


class RandomBrightness(_RandomIntensity):
    """Change brightness: blend with black.

    Args:
        intensity_min: least brightness; 0 is black, 1 the given image.
        intensity_max: greatest brightness.
    """

    def _other_image(self, image: np.ndarray) -> np.ndarray:
        return np.zeros((), dtype=np.float32)


class RandomSaturation(_RandomIntensity):
    """Change saturation: blend with the grey image. The channels must be R, G, B.

    Args:
        intensity_min: least saturation; 0 is grey, 1 the given image.
        intensity_max: greatest saturation.
    """

    def _other_image(self, image: np.ndarray) -> np.ndarray:
        if image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"RandomSaturation needs an RGB image (H, W, 3), got {image.shape}")
        found: np.ndarray = (image @ _LUMA)[:, :, None]
        return found


class RandomLighting(Augmentation):
    """Shift all colours along the principal axes of natural images. The channels must be R, G, B.

    Args:
        scale: standard deviation of the draws; 0.1 is usual.

    Source: Krizhevsky et al., ImageNet Classification with Deep CNNs, 2012, section 4.1; axes and
    variances are those of ImageNet.
    """

    def __init__(self, scale: float) -> None:
        self.scale = scale
        self.eigen_vecs = np.array(
            [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
        )
        self.eigen_vals = np.array([0.2175, 0.0188, 0.0045])

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draw the shift."""
        if image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"RandomLighting needs an RGB image (H, W, 3), got {image.shape}")
        weights = np.random.normal(scale=self.scale, size=3)
        shift = self.eigen_vecs @ (weights * self.eigen_vals)
        return BlendTransform(src_image=shift, src_weight=1.0, dst_weight=1.0)


class ColorAugSSDTransform(Transform):
    """SSD's photometric distortion: brightness, contrast, saturation, hue, each by half a chance.

    It draws anew for every image that it is applied to.

    Args:
        img_format: ``"BGR"`` or ``"RGB"``, the order of the channels.
        brightness_delta: largest shift of all values, of 255.
        contrast_low: least factor of all values.
        contrast_high: greatest factor of all values.
        saturation_low: least factor of the saturation.
        saturation_high: greatest factor of the saturation.
        hue_delta: largest turn of the hue, in units of 2 degrees.

    Raises:
        ValueError: another format.

    Source: Liu et al., SSD (2016), section 2.2, "Data augmentation"; Howard (2013), section 2.
    """

    def __init__(
        self,
        img_format: str,
        brightness_delta: int = 32,
        contrast_low: float = 0.5,
        contrast_high: float = 1.5,
        saturation_low: float = 0.5,
        saturation_high: float = 1.5,
        hue_delta: int = 18,
    ) -> None:
        super().__init__()
        if img_format not in ("BGR", "RGB"):
            raise ValueError(f"ColorAugSSDTransform: img_format is BGR or RGB, got {img_format!r}")
        self.is_rgb = img_format == "RGB"
        self.brightness_delta = brightness_delta
        self.contrast = (contrast_low, contrast_high)
        self.saturation = (saturation_low, saturation_high)
        self.hue_delta = hue_delta

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Return the coordinates as they are."""
        return coords

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Return the labels as they are."""
        return segmentation

    def inverse(self) -> Transform:
        """Return a transform that does nothing: colours are not brought back."""
        return NoOpTransform()

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        """Distort an image (H, W, 3), uint8, channels in the order given; returns uint8."""
        del interp
        if img.dtype != np.uint8 or img.ndim != 3 or img.shape[2] != 3:
            raise ValueError(
                f"ColorAugSSDTransform needs (H, W, 3) uint8, got {img.shape} {img.dtype}"
            )
        shift = self._drawn(-self.brightness_delta, self.brightness_delta, 0.0)
        values = _whole(img.astype(np.float32) + shift)
        contrast_first = np.random.randint(2) == 1
        factor = self._drawn(*self.contrast, 1.0)
        if contrast_first:
            values = _whole(values * factor)
        values = self._change_saturation_and_hue(values)
        return values if contrast_first else _whole(values * factor)

    def _drawn(self, low: float, high: float, neutral: float) -> float:
        """Draw a number from a range, or by half a chance return the one that changes nothing."""
        return np.random.uniform(low, high) if np.random.randint(2) else neutral

    def _change_saturation_and_hue(self, img: np.ndarray) -> np.ndarray:
        import cv2

        saturation = self._drawn(*self.saturation, 1.0)
        hue = self._drawn(-self.hue_delta, self.hue_delta, 0.0)
        if saturation == 1.0 and hue == 0.0:
            return img
        there, back = (
            (cv2.COLOR_RGB2HSV, cv2.COLOR_HSV2RGB)
            if self.is_rgb
            else (cv2.COLOR_BGR2HSV, cv2.COLOR_HSV2BGR)
        )
        hsv = cv2.cvtColor(img, there)
        hsv[..., 1] = _whole(hsv[..., 1] * np.float32(saturation))
        hsv[..., 0] = (hsv[..., 0].astype(np.int32) + round(hue)) % 180  # OpenCV's full turn
        return cv2.cvtColor(hsv, back)


def _whole(values: np.ndarray) -> np.ndarray:
    """Clip values to [0, 255] and drop their fractions: uint8."""
    return values.clip(0, 255).astype(np.uint8)
