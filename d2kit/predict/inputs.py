"""From what a user gives to what a model takes: one check of images, one image-to-input."""

import os
from typing import Any, Literal

import numpy as np
import torch

from d2kit.structures.image_list import image_to_tensor
from d2kit.data.detection_utils import convert_PIL_to_numpy, read_image

__all__ = ["ColorOrder", "Image", "check_color", "model_input", "to_array"]

ColorOrder = Literal["RGB", "BGR"]
Image = Any
"""An array (H, W, 3), a path, or a `PIL.Image.Image`."""

_EXPECTED = "expected an image: an array (H, W, 3) uint8 of 0..255, a path or a PIL image"


def check_color(color: str) -> None:
    """Make sure that an order of channels is one of the two."""
    if color not in ("RGB", "BGR"):
        raise ValueError(f"color: expected 'RGB' or 'BGR', got {color!r}")


def to_array(image: Image, *, color: str, wanted: str) -> np.ndarray:
    """Return an image as the model wants it, whatever it was given as.

    Args:
        image: array (H, W, 3): uint8, or another type with values of 0..255; a path; a PIL image,
            which is RGB by itself.
        color: "RGB" or "BGR", the order of the channels of an array.
        wanted: the order of the result.

    Returns:
        (H, W, 3) uint8; a float array stays one.

    Raises:
        ValueError: if it is no image, is empty, or has values of another range.
        OSError: if a file is damaged.
    """
    if isinstance(image, (str, os.PathLike)):
        return read_image(image, wanted)
    if type(image).__module__.partition(".")[0] == "PIL" and hasattr(image, "convert"):
        if 0 in image.size:
            raise ValueError(f"{_EXPECTED}, got an empty one of {image.size} pixels")
        return convert_PIL_to_numpy(image, wanted)
    array = _checked(image)
    return array if wanted == color else array[:, :, ::-1]


def _checked(image: Any) -> np.ndarray:
    hints: dict[type, str] = {
        type(None): "None: cv2.imread returns it for a file that it cannot read",
        bytes: "bytes: decode them first, cv2.imdecode(np.frombuffer(data, np.uint8), 1)",
        torch.Tensor: "a torch tensor: give its array (H, W, 3), tensor.cpu().numpy()",
    }
    for kind, text in hints.items():
        if isinstance(image, kind):
            shape = f" of shape {tuple(image.shape)}" if isinstance(image, torch.Tensor) else ""
            raise ValueError(f"{_EXPECTED}, got {text}{shape}")
    if not isinstance(image, np.ndarray):
        raise ValueError(f"{_EXPECTED}, got {type(image).__name__}")
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"{_EXPECTED}, got shape {image.shape}; read_image makes three channels")
    if 0 in image.shape:
        raise ValueError(f"{_EXPECTED}, got an empty one of shape {image.shape}")
    return image if image.dtype == np.uint8 else _of_other_type(image)


def _of_other_type(image: np.ndarray) -> np.ndarray:
    """Return an array of another type than uint8 that nevertheless holds values of 0..255."""
    kind = image.dtype.kind
    if kind not in "iuf" or image.dtype == np.uint16:
        advice = {"b": "image.astype(np.uint8) * 255", "u": "(image // 257).astype(np.uint8)"}
        more = f": {advice[kind]}" if kind in advice else ""
        raise ValueError(f"{_EXPECTED}, got {image.dtype}{more}")
    low, high = float(image.min()), float(image.max())
    if not (low >= 0 and high <= 255):  # also where one is NaN
        raise ValueError(f"{_EXPECTED}, got {image.dtype} of {low:g}..{high:g}")
    if kind in "iu":
        return image.astype(np.uint8)
    if 0 < high <= 1:
        raise ValueError(
            f"{_EXPECTED}, got {image.dtype} of {low:g}..{high:g}: (image * 255).astype(np.uint8)"
        )
    return image


def model_input(image: np.ndarray, resize: Any) -> dict[str, Any]:
    """Return the model's input for one image.

    Args:
        image: (H, W, 3) in the order that the model was trained with.
        resize: an `Augmentation` or `Transform`, of `build_augmentation`.

    Returns:
        ``image`` (3, h, w), resized, and ``height`` and ``width`` before that, in pixels.
    """
    resized = resize.get_transform(image).apply_image(image)
    height, width = image.shape[:2]
    if resized.dtype != np.uint8:
        resized = resized.astype(np.float32)
    return {"image": image_to_tensor(resized), "height": height, "width": width}
