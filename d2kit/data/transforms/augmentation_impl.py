"""The augmentations that the library brings along."""

from d2kit.data.transforms._crops import (
    FixedSizeCrop,
    MinIoURandomCrop,
    RandomCrop,
    RandomCrop_CategoryAreaConstraint,
)
from d2kit.data.transforms._geometric import (
    RandomApply,
    RandomExtent,
    RandomFlip,
    RandomResize,
    RandomRotation,
    Resize,
    ResizeScale,
    ResizeShortestEdge,
)
from d2kit.data.transforms._photometric import (
    RandomBrightness,
    RandomContrast,
    RandomLighting,
    RandomSaturation,
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
