"""Augmentations that change colours."""

import numpy as np

from d2kit.data.transforms.augmentation import Augmentation
from d2kit.data.transforms.transform import BlendTransform, Transform

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
