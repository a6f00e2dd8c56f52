"""SSD's photometric augmentation."""

from d2kit.data.transforms import ColorAugSSDTransform

__all__ = ["ColorAugSSDTransform"]
