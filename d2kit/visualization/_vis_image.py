"""The picture that is drawn on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from d2kit.utils.file_io import atomic_write


class VisImage:
    """An RGB picture of exactly ``round(scale * size)`` pixels.

    Args:
        img: (H, W, 3) or (H, W) RGB in [0, 255].
        scale: size of the output relative to `img`.

    Attributes:
        pixels: (scale * H, scale * W, 3) uint8 RGB, drawn on in place.
        width: W of `img`.
        height: H of `img`.
    """

    def __init__(self, img: Any, scale: float = 1.0) -> None:
        if not scale > 0:
            raise ValueError(f"scale must be above 0, got {scale}")
        self.scale = scale
        self._figure: Any = None
        self._axes: Any = None
        self.reset_image(img)

    def reset_image(self, img: Any) -> None:
        """Replace the picture; what was drawn on it is lost.

        Args:
            img: (H, W, 3) or (H, W) RGB in [0, 255].

        Raises:
            ValueError: another shape.
        """
        import cv2

        array = np.asarray(img)
        if array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 1):
            array = np.repeat(array.reshape(*array.shape[:2], 1), 3, axis=2)
        if array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
            raise ValueError(f"An image must be (H, W, 3) RGB, got shape {array.shape}")
        if array.dtype != np.uint8:
            array = np.clip(np.round(array), 0, 255).astype(np.uint8)
        self.height, self.width = array.shape[:2]
        size = (max(round(self.width * self.scale), 1), max(round(self.height * self.scale), 1))
        if size == (self.width, self.height):
            self.pixels = array.copy(order="C")
        else:
            way = cv2.INTER_AREA if self.scale < 1 else cv2.INTER_CUBIC
            self.pixels = np.ascontiguousarray(cv2.resize(array, size, interpolation=way))

    @property
    def fig(self) -> Any:
        """A transparent matplotlib figure over the picture; see `ax`."""
        if self._figure is None:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure

            height, width = self.pixels.shape[:2]
            dpi = 100.0
            self._figure = Figure(figsize=(width / dpi, height / dpi), dpi=dpi, frameon=False)
            FigureCanvasAgg(self._figure)
            self._axes = self._figure.add_axes((0.0, 0.0, 1.0, 1.0))
            self._axes.axis("off")
            self._axes.set_xlim(0.0, self.width)
            self._axes.set_ylim(self.height, 0.0)
        return self._figure

    @property
    def ax(self) -> Any:
        """Matplotlib axes in the coordinates of the input image, for drawings of one's own."""
        return self.fig.axes[0]

    def get_image(self) -> np.ndarray:
        """Return a copy of the picture: (scale * H, scale * W, 3) uint8 RGB."""
        picture = self.pixels.copy()
        if self._figure is not None:
            self._figure.canvas.draw()
            height, width = picture.shape[:2]
            layer = np.asarray(self._figure.canvas.buffer_rgba())[:height, :width]
            # matplotlib's buffer is not premultiplied
            alpha = layer[..., 3:].astype(np.float32) / 255
            region = picture[: layer.shape[0], : layer.shape[1]]
            region[:] = np.round(region * (1 - alpha) + layer[..., :3] * alpha).astype(np.uint8)
        return picture

    def save(self, filepath: str | Path) -> None:
        """Write the picture to a file; the ending names the format (none: PNG).

        Raises:
            ValueError: an ending that is no image format.
        """
        from PIL import Image

        path = Path(filepath)
        if not path.suffix:
            path = path.with_name(path.name + ".png")
        formats = Image.registered_extensions()
        if path.suffix.lower() not in formats:
            raise ValueError(f"{path}: {path.suffix!r} is no image format; use .png, .jpg or .webp")
        with atomic_write(path) as file:
            Image.fromarray(self.get_image()).save(
                file, format=formats[path.suffix.lower()], quality=95
            )
