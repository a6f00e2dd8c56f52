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
    ``aug_input.boxes``; an only argument of another name is the image. A subclass whose signature
    cannot tell sets `input_args`.
    """

    input_args: tuple[str, ...] | None = None

    def _init(self, params: dict[str, Any] | None = None) -> None:
        """Store constructor arguments, usually ``locals()``, as attributes."""
        given = dict(params or {})
        given.pop("self", None)
        for public in [name for name in given if not name.startswith("_")]:
            setattr(self, public, given[public])

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
        start, stop = (0.0, low) if high is None else (low, high)
        return np.random.uniform(start, stop, size)

    def __repr__(self) -> str:
        """Write the call that makes this object, without arguments that have their defaults."""
        arguments = inspect.signature(type(self)).parameters.values()
        named = [a for a in arguments if a.kind not in (a.VAR_POSITIONAL, a.VAR_KEYWORD)]
        if not all(hasattr(self, a.name) for a in named):
            return object.__repr__(self)
        changed = {a.name: getattr(self, a.name) for a in named}
        changed = {a.name: changed[a.name] for a in named if changed[a.name] is not a.default}
        shown = ", ".join(f"{name}={_short_text(value)}" for name, value in changed.items())
        return f"{type(self).__name__}({shown})"

    __str__ = __repr__


def _short_text(value: object) -> str:
    """Return `repr(value)`, or dots where it is long."""
    text = repr(value)
    return "..." if "\n" in text or len(text) > 80 else text


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


def _get_aug_input_args(aug: Augmentation, aug_input: object) -> list[Any]:
    """Return what `aug.get_transform` asks of `aug_input`, in the order of its arguments."""
    if aug.input_args is None:
        parameters = list(inspect.signature(aug.get_transform).parameters.values())
        if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
            raise TypeError(
                f"{type(aug).__name__}.get_transform takes *args or **kwargs, so that the inputs "
                "it needs are unknown; set the class attribute input_args, e.g. ('image', 'boxes')"
            )
        names = tuple(p.name for p in parameters if p.default is p.empty)
        if len(names) == 1 and not hasattr(aug_input, names[0]):
            names = ("image",)  # user code calls its only argument img, im, ...
        aug.input_args = names
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

    def __call__(self, aug_input: object) -> TransformList:
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
    augmentations: Sequence[Augmentation | Transform], inputs: object
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


def _check_img_dtype(img: object) -> None:
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
