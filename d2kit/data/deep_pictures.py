"""Pictures deeper than 8 bits: their white, and TIFFs that Pillow does not know."""

from __future__ import annotations

import io
import logging
import os
from typing import TYPE_CHECKING

import numpy as np

from d2kit.utils.file_io import MAX_IMAGE_PIXELS
from d2kit.utils.text import one_line

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)

# White of a picture deeper than 8 bits is the first of these that no value exceeds: 1 only of
# floats, 255 only of floats and 32 bits, 12 bits, 16 bits. Cameras and scanners store 12 bits in 16
# and rarely say so in the file.
_WHITES = (1, 255, 4095, 65535)
_TOLD: set[tuple[str, int]] = set()


def _check_pixels(width: int, height: int, file_name: str | os.PathLike[str]) -> None:
    if width * height > MAX_IMAGE_PIXELS:
        raise ValueError(
            f"{file_name}: refused as too large: {width}x{height} pixels, the limit is "
            f"{MAX_IMAGE_PIXELS} (d2kit.data.detection_utils.MAX_IMAGE_PIXELS)"
        )


def _scaled(values: np.ndarray, name: str | os.PathLike[str]) -> np.ndarray:
    """Scale deep pixels to uint8 by the rule of `read_image`, and say so once for each kind."""
    floats = np.issubdtype(values.dtype, np.floating)
    kind = "float" if floats else f"{8 * values.dtype.itemsize}-bit"
    values = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    most = values.max(initial=0)
    whites = _WHITES if floats else _WHITES[1:] if kind == "32-bit" else _WHITES[2:]
    white = next((w for w in whites if most <= w), _WHITES[-1])
    if (kind, white) not in _TOLD:
        _TOLD.add((kind, white))
        usual = (kind, white) == ("16-bit", _WHITES[-1])
        logger.log(
            logging.INFO if usual else logging.WARNING,
            "%s: %s pixels whose largest value is %g: 0..%d becomes 0..255 (docs/own_data.md; said "
            "once for this kind). Write 8-bit pictures where that is not what they mean",
            *(one_line(name), kind, most, white),
        )
    return np.floor(values.clip(0, white) * (255 / white) + 0.5).astype(np.uint8)


def _decode_deep(data: bytes, name: str | os.PathLike[str]) -> Image.Image | None:
    """Decode a picture of 16 bits or floats by OpenCV to an 8-bit Pillow image; None if it cannot.

    TIFF comes upright, other formats as they are stored.
    """
    import cv2
    from PIL import Image

    try:
        pixels = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        return None
    if pixels is None or pixels.dtype == np.uint8:
        return None
    pixels = pixels if pixels.ndim == 2 else pixels[..., 2::-1] if pixels.shape[2] > 2 else None
    return None if pixels is None else Image.fromarray(_scaled(pixels, name))


def _open_tiff(data: bytes, name: str | os.PathLike[str]) -> Image.Image:
    """Decode a TIFF of a kind that Pillow does not know, such as colours in floats.

    Raises:
        ValueError: OpenCV does not know it either, or it is too large; with what it says of itself.
    """
    from PIL import TiffImagePlugin

    stream = io.BytesIO(data)
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(data[:8])
        stream.seek(tags.next)
        tags.load(stream)
        width, height = int(tags.get(256, 0)), int(tags.get(257, 0))
        told = (
            f"bits {tags.get(258)}, sample format {tags.get(339, 1)}, compression {tags.get(259)}"
        )
    except Exception as error:  # the parser raises many types at damaged tags
        raise OSError(f"{name}: damaged TIFF header: {error}") from error
    _check_pixels(width, height, name)
    image = _decode_deep(data, name)
    if image is None or sorted(image.size) != sorted((width, height)):
        raise ValueError(
            f"{name}: a TIFF of {width}x{height} pixels of a kind that is not read ({told}); write "
            "it as 8-bit RGB or grey, for example as PNG"
        )
    return image
