"""The protocol of augmentations: draw a transform for a given input, and apply it.

An `Augmentation` draws from numpy's global generator. The train loader seeds that generator for
each sample, so that augmentations written by users are reproducible without effort.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np

from d2kit.data.transforms.transform import Transform, TransformList

__all__ = [
    "AugInput",
    "Augmentation",
    "AugmentationList",
    "StandardAugInput",
    "TransformGen",
    "apply_augmentations",
    "apply_transform_gens",
]


class Augmentation:
    """Base class of random (or image-dependent) choices of a `Transform`.

    A subclass defines ``get_transform``. The names of its arguments say what it needs of the
    input: ``get_transform(self, image, boxes)`` is called with ``aug_input.image`` and
    ``aug_input.boxes``. A subclass whose signature cannot tell sets `input_args`.
    """

    input_args: tuple[str, ...] | None = None

    def _init(self, params: dict[str, Any] | None = None) -> None:
        """Store constructor arguments, usually ``locals()``, as attributes."""
        for name, value in (params or {}).items():
            if name != "self" and not name.startswith("_"):
                setattr(self, name, value)

    def get_transform(self, *args: Any) -> Transform:
        """Return the transform to use for the given input; subclasses define this."""
        raise NotImplementedError(f"{type(self).__name__} must define get_transform")

    def __call__(self, aug_input: Any) -> Transform:
        """Draw a transform, apply it to `aug_input` in place and return it.

        Args:
            aug_input: an `AugInput`, or any object with the needed attributes and a method
                ``transform(tfm)``.
        """
        tfm = self.get_transform(*_get_aug_input_args(self, aug_input))
        if not isinstance(tfm, Transform):
            raise TypeError(
                f"{type(self).__name__}.get_transform must return a Transform, got "
                f"{type(tfm).__name__}"
            )
        aug_input.transform(tfm)
        return tfm

    def _rand_range(self, low: float = 1.0, high: float | None = None, size: Any = None) -> Any:
        """Draw uniformly from [low, high), or from [0, low) where `high` is not given."""
        if high is None:
            low, high = 0.0, low
        return np.random.uniform(low, high, size)

    def __repr__(self) -> str:
        parts = []
        for name, parameter in inspect.signature(type(self).__init__).parameters.items():
            if name == "self":
                continue
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            if not hasattr(self, name):
                return object.__repr__(self)
            value = getattr(self, name)
            if value is parameter.default:
                continue
            text = repr(value)
            parts.append(f"{name}={text if len(text) <= 80 and chr(10) not in text else '...'}")
        return f"{type(self).__name__}({', '.join(parts)})"

    __str__ = __repr__


class _TransformToAug(Augmentation):
    """The augmentation that always takes one given transform."""

    input_args = ()

    def __init__(self, tfm: Transform) -> None:
        self.tfm = tfm

    def get_transform(self, *args: Any) -> Transform:
        return self.tfm

    def __repr__(self) -> str:
        return repr(self.tfm)

    __str__ = __repr__


def _transform_to_aug(tfm_or_aug: Augmentation | Transform) -> Augmentation:
    """Wrap a `Transform` as an augmentation; augmentations are returned as they are."""
    if isinstance(tfm_or_aug, Augmentation):
        return tfm_or_aug
    if isinstance(tfm_or_aug, Transform):
        return _TransformToAug(tfm_or_aug)
    raise TypeError(
        f"expected an Augmentation or a Transform, got {type(tfm_or_aug).__name__}: {tfm_or_aug!r}"
    )


def _get_aug_input_args(aug: Augmentation, aug_input: Any) -> list[Any]:
    """Return what `aug.get_transform` asks of `aug_input`, in the order of its arguments."""
    if aug.input_args is None:
        parameters = list(inspect.signature(aug.get_transform).parameters.values())
        if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
            raise TypeError(
                f"{type(aug).__name__}.get_transform takes *args or **kwargs, so that the inputs "
                "it needs are unknown; set the class attribute input_args, e.g. ('image', 'boxes')"
            )
        aug.input_args = tuple(p.name for p in parameters if p.default is p.empty)
    missing = [name for name in aug.input_args if not hasattr(aug_input, name)]
    if missing:
        have = sorted(n for n in getattr(aug_input, "__dict__", {}) if not n.startswith("_"))
        raise AttributeError(
            f"{type(aug).__name__} needs {missing} of its input, but {type(aug_input).__name__} "
            f"has only {have}"
        )
    return [getattr(aug_input, name) for name in aug.input_args]


class AugmentationList(Augmentation):
    """Apply augmentations one after the other; each sees the result of those before.

    Args:
        augs: augmentations or transforms.
    """

    def __init__(self, augs: Sequence[Augmentation | Transform]) -> None:
        self.augs = [_transform_to_aug(aug) for aug in augs]

    def __call__(self, aug_input: Any) -> TransformList:
        """Apply all to `aug_input` in place; return the transforms that were drawn."""
        return TransformList([aug(aug_input) for aug in self.augs])

    def __repr__(self) -> str:
        return f"AugmentationList[{', '.join(str(aug) for aug in self.augs)}]"

    __str__ = __repr__


class AugInput:
    """An image and what belongs to it, to be augmented together.

    Args:
        image: (H, W) or (H, W, C), uint8 in 0..255 or floating point in 0..1 or 0..255.
        boxes: (R, 4) floating point, XYXY, absolute pixels; or None.
        sem_seg: (H, W) integer labels; or None.

    Raises:
        ValueError: for an image of another type or shape.
    """

    def __init__(
        self,
        image: np.ndarray,
        *,
        boxes: np.ndarray | None = None,
        sem_seg: np.ndarray | None = None,
    ) -> None:
        _check_img_dtype(image)
        self.image = image
        self.boxes = boxes
        self.sem_seg = sem_seg

    def transform(self, tfm: Transform) -> None:
        """Apply `tfm` to the image, the boxes and the labels, in place of the former ones."""
        self.image = tfm.apply_image(self.image)
        if self.boxes is not None:
            self.boxes = tfm.apply_box(self.boxes)
        if self.sem_seg is not None:
            self.sem_seg = tfm.apply_segmentation(self.sem_seg)

    def apply_augmentations(
        self, augmentations: Sequence[Augmentation | Transform]
    ) -> TransformList:
        """Apply `augmentations` in order; return the transforms that were drawn."""
        return AugmentationList(augmentations)(self)


def apply_augmentations(
    augmentations: Sequence[Augmentation | Transform], inputs: Any
) -> tuple[Any, TransformList]:
    """Augment an image, or an `AugInput`.

    Args:
        augmentations: augmentations or transforms, applied in order.
        inputs: an image (H, W) or (H, W, C), or an `AugInput`, which is changed in place.

    Returns:
        The augmented image or `inputs`, and the `TransformList` that was applied.
    """
    if isinstance(inputs, np.ndarray):
        aug_input = AugInput(inputs)
        transforms = aug_input.apply_augmentations(augmentations)
        return aug_input.image, transforms
    return inputs, AugmentationList(augmentations)(inputs)


def _check_img_dtype(img: Any) -> None:
    if not isinstance(img, np.ndarray):
        raise ValueError(f"an image must be a numpy array, got {type(img).__name__}")
    if img.dtype != np.uint8 and not np.issubdtype(img.dtype, np.floating):
        raise ValueError(f"an image must be uint8 or floating point, got {img.dtype}")
    if img.ndim not in (2, 3):
        raise ValueError(f"an image must be (H, W) or (H, W, C), got shape {img.shape}")


# Detectron2's former names, which user code still imports
TransformGen = Augmentation
StandardAugInput = AugInput
apply_transform_gens = apply_augmentations
