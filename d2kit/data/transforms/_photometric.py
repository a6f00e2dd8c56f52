"""Augmentations that change colours."""

import numpy as np

from d2kit.data.transforms.augmentation import Augmentation
from d2kit.data.transforms.transform import BlendTransform, NoOpTransform, Transform

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
        return image.mean()


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
        return (image @ _LUMA)[:, :, None]


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
