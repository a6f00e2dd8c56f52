"""Colours, and the drawing methods of `Visualizer` that know nothing of data sets."""

from __future__ import annotations

import colorsys
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from d2kit.utils.file_io import atomic_write
from d2kit.utils.text import one_line
from d2kit.visualization import canvas as _canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.backend_bases import FigureCanvasBase
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike

Color = tuple[float, float, float]
ColorLike = str | Sequence[float] | np.ndarray

_RED: Color = (1.0, 0.0, 0.0)
_GOLDEN = 0.618033988749895  # hue step: any run of neighbours is spread over the circle
_SHADES = ((0.85, 1.0), (0.60, 1.0), (1.0, 0.82))  # (saturation, value)


def palette(index: int) -> Color:
    """Return colour `index` of an endless list whose neighbours differ clearly.

    Args:
        index: >= 0; the same index always gives the same colour.
    """
    saturation, value = _SHADES[index % len(_SHADES)]
    return colorsys.hsv_to_rgb((0.02 + index * _GOLDEN) % 1.0, saturation, value)


def to_rgb(color: ColorLike) -> Color:
    """Return any colour notation as (r, g, b) in [0, 1].

    Args:
        color: a name or hex string of matplotlib's (``"g"``, ``"tab:blue"``, ``"#ff8800"``), or
            3 or 4 numbers in [0, 1], or in [0, 255] where one exceeds 1. Opacity is dropped.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(color, str):
        from matplotlib.colors import to_rgb as named

        return named(color)
    values = [float(value) for value in color]
    if len(values) not in (3, 4) or min(values) < 0 or max(values) > 255:
        raise ValueError(f"A colour is a name or 3 numbers in [0, 1] or [0, 255], got {color!r}")
    scale = 255.0 if max(values) > 1 else 1.0
    return (values[0] / scale, values[1] / scale, values[2] / scale)


def to_bytes(color: ColorLike) -> tuple[int, int, int]:
    """Return a colour as three integers in [0, 255]."""
    red, green, blue = to_rgb(color)
    return round(red * 255), round(green * 255), round(blue * 255)


def change_brightness(color: ColorLike, factor: float) -> Color:
    """Scale the lightness of a colour.

    Args:
        color: see `to_rgb`.
        factor: in [-1, 1]; -0.5 halves the lightness, 0.5 makes it half as much again.

    Raises:
        ValueError: `factor` is outside its range.
    """
    if not -1.0 <= factor <= 1.0:
        raise ValueError(f"brightness_factor must be in [-1, 1], got {factor}")
    hue, lightness, saturation = colorsys.rgb_to_hls(*to_rgb(color))
    lightness = min(max(lightness * (1.0 + factor), 0.0), 1.0)
    return colorsys.hls_to_rgb(hue, lightness, saturation)


def luminance(color: Color) -> float:
    """Return the relative luminance in [0, 1] (ITU-R BT.709, linearised by a power of 2.2)."""
    red, green, blue = (channel**2.2 for channel in color)
    return float(0.2126 * red + 0.7152 * green + 0.0722 * blue)


def text_color_on(background: Color) -> Color:
    """Return black or white, whichever contrasts more with `background` (WCAG 2.1)."""
    return (0.0, 0.0, 0.0) if (luminance(background) + 0.05) ** 2 > 1.05 * 0.05 else (1.0, 1.0, 1.0)


def lightened(color: ColorLike, least: float = 0.3) -> Color:
    """Mix in white until the luminance is at least `least`, so that text shows on black."""
    red, green, blue = to_rgb(color)
    for white in (step / 20 for step in range(21)):
        mixed = (red + (1 - red) * white, green + (1 - green) * white, blue + (1 - blue) * white)
        if luminance(mixed) >= least:
            return mixed
    return (1.0, 1.0, 1.0)


def rgb_pixels(img: object) -> np.ndarray:
    """Return an image as (H, W, 3) uint8 RGB.

    Args:
        img: see `VisImage`; bool counts as 0 and 255, values that are not finite as 0.

    Raises:
        ValueError: another shape, or no numbers.
    """
    array = np.asarray(img)
    if array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 1):
        array = np.repeat(array.reshape(*array.shape[:2], 1), 3, axis=2)
    numbers = array.dtype == bool or np.issubdtype(array.dtype, np.number)
    if array.ndim != 3 or array.shape[2] not in (3, 4) or 0 in array.shape or not numbers:
        raise ValueError(
            "An image must be (H, W, 3) RGB, (H, W, 4) RGBA or (H, W) grey, got shape "
            f"{array.shape} of {array.dtype}"
        )
    array = array[..., :3]
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if array.dtype != np.uint8:
        finite = np.nan_to_num(array.astype(np.float64), posinf=255.0)
        array = np.clip(np.round(finite), 0, 255).astype(np.uint8)
    return array


class VisImage:
    """An RGB picture of exactly ``round(scale * size)`` pixels.

    Args:
        img: (H, W, 3) RGB, (H, W, 4) RGBA, whose opacity is dropped, or (H, W) grey, in [0, 255].
        scale: size of the output relative to `img`.

    Attributes:
        pixels: (scale * H, scale * W, 3) uint8 RGB, drawn on in place.
        width: W of `img`.
        height: H of `img`.
    """

    def __init__(self, img: ArrayLike, scale: float = 1.0) -> None:
        if not scale > 0:
            raise ValueError(f"scale must be above 0, got {scale}")
        self.scale = scale
        self.reset_image(img)

    def reset_image(self, img: ArrayLike) -> None:
        """Replace the picture; what was drawn on it is lost.

        Args:
            img: see `VisImage`.

        Raises:
            ValueError: another shape.
        """
        import cv2

        array = rgb_pixels(img)
        self.height, self.width = array.shape[:2]
        size = (max(round(self.width * self.scale), 1), max(round(self.height * self.scale), 1))
        if size == (self.width, self.height):
            self.pixels = array.copy(order="C")
        else:
            way = cv2.INTER_AREA if self.scale < 1 else cv2.INTER_CUBIC
            self.pixels = np.ascontiguousarray(cv2.resize(array, size, interpolation=way))

    @functools.cached_property
    def fig(self) -> Figure:
        """A transparent matplotlib figure over the picture; see `ax`."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        height, width = self.pixels.shape[:2]
        dpi = 100.0
        figure = Figure(figsize=(width / dpi, height / dpi), dpi=dpi, frameon=False)
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        axes.axis("off")
        axes.set_xlim(0.0, self.width)
        axes.set_ylim(self.height, 0.0)
        return figure

    @property
    def ax(self) -> Axes:
        """Matplotlib axes in the coordinates of the input image, for drawings of one's own."""
        return self.fig.axes[0]

    @property
    def canvas(self) -> FigureCanvasBase:
        """The figure's canvas, for drawings of one's own."""
        return self.fig.canvas

    def get_image(self) -> np.ndarray:
        """Return a copy of the picture: (scale * H, scale * W, 3) uint8 RGB."""
        picture: np.ndarray = self.pixels.copy()
        if "fig" in vars(self):  # somebody drew on it
            canvas: Any = self.canvas
            canvas.draw()
            height, width = picture.shape[:2]
            layer = np.asarray(canvas.buffer_rgba())[:height, :width]
            alpha = layer[..., 3:].astype(np.float32) / 255  # the colours are not premultiplied
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


_POINT = 100 / 72  # canvas pixels per point at scale 1, as in a matplotlib figure of 100 dpi
_PLATE_OPACITY = 0.8


class DrawingBase:
    """Draws shapes and text on `output`; coordinates are those of the unscaled image.

    What has coordinates that are not finite is left out.

    Args:
        img_rgb: (H, W, 3) RGB, (H, W, 4) RGBA, whose opacity is dropped, or (H, W) grey, in
            [0, 255].
        scale: size of the output relative to the image.
        font_size_scale: factor on the size of all text that gives no size.
    """

    def __init__(self, img_rgb: object, scale: float = 1.0, font_size_scale: float = 1.0) -> None:
        self.img = rgb_pixels(img_rgb)
        self.output = VisImage(self.img, scale=scale)
        # em height in output pixels: 9 at 96x128, 13 at 640x480, 22 at 1080p
        pixels = 8 + math.sqrt(self.output.width * self.output.height) * scale / 100
        self._default_font_size = pixels * font_size_scale / (_POINT * scale)
        self._line_width = max(round(pixels / 7), 1)
        self._taken: list[_canvas.Rect] = []

    def get_output(self) -> VisImage:
        """Return the picture with everything drawn so far."""
        return self.output

    # ------------------------------------------------------------------ text
    def _pixels(self, font_size: float | None) -> int:
        """Convert a font size in points to an em height in output pixels."""
        size = self._default_font_size if font_size is None else font_size
        return max(round(size * _POINT * self.output.scale), 1)

    def draw_text(
        self,
        text: str,
        position: Sequence[float],
        *,
        font_size: float | None = None,
        color: ColorLike = "g",
        horizontal_alignment: str = "center",
        rotation: float = 0,
    ) -> VisImage:
        """Write text on a dark plate; it is shifted inside where it would leave the picture.

        Args:
            text: one or more lines.
            position: x, y of the plate's top edge, in image pixels.
            font_size: points at 100 dpi and scale 1; default fits the image.
            color: of the text; lightened until it shows on the dark plate.
            horizontal_alignment: ``left``, ``center`` or ``right``: which end of the plate is at x.
            rotation: degrees counter-clockwise.

        Raises:
            ValueError: unknown `horizontal_alignment`.
        """
        shares = {"left": 0.0, "center": 0.5, "right": 1.0}
        if horizontal_alignment not in shares:
            raise ValueError(
                f"horizontal_alignment must be one of {list(shares)}, got {horizontal_alignment!r}"
            )
        if not np.isfinite(np.asarray(position, dtype=np.float64)).all():
            return self.output
        picture = _canvas.plate(
            "\n".join(one_line(line, None) for line in str(text).split("\n")),
            self._pixels(font_size),
            to_bytes(lightened(color)),
            (0, 0, 0),
            _PLATE_OPACITY,
            float(rotation),
        )
        height, width = picture.shape[:2]
        scale = self.output.scale
        x = position[0] * scale - width * shares[horizontal_alignment]
        left, top = _canvas.inside(x, position[1] * scale, (width, height), self._canvas_size())
        _canvas.paste(self.output.pixels, picture, left, top)
        self._taken.append((left, top, left + width, top + height))
        return self.output

    def _draw_label(
        self, text: str, color: ColorLike, box: Sequence[float], *, center: bool = False
    ) -> None:
        """Write a label on a plate of the instance's colour, clear of other labels if possible.

        Args:
            text: the label.
            color: of the plate; the text is black or white.
            box: x0, y0, x1, y1 of the instance, in image pixels.
            center: put the plate's centre at the centre of `box`, if that is free.
        """
        if not np.isfinite(np.asarray(box, dtype=np.float64)).all():
            return
        if type(self).draw_text is not DrawingBase.draw_text:  # a subclass writes by itself
            x, way = ((box[0] + box[2]) / 2, "center") if center else (box[0], "left")
            y = (box[1] + box[3]) / 2 if center else box[1]
            self.draw_text(text, (x, y), color=color, horizontal_alignment=way)
            return
        background = to_rgb(color)
        pixels = self._pixels(None)
        picture = _canvas.plate(
            _canvas.fitted(text, pixels, self._canvas_size()[0]),
            pixels,
            to_bytes(text_color_on(background)),
            to_bytes(background),
            _PLATE_OPACITY + 0.1,
        )
        height, width = picture.shape[:2]
        scale = self.output.scale
        x0, y0, x1, y1 = (float(value) * scale for value in box)
        small = (x1 - x0) * (y1 - y0) < 4.0 * width * height or y1 - y0 < 3 * height
        wishes = _canvas.wishes_for_box((x0, y0, x1, y1), (width, height), small)
        if center:
            wishes.insert(0, ((x0 + x1 - width) / 2, (y0 + y1 - height) / 2))
        left, top = _canvas.place((width, height), wishes, self._taken, self._canvas_size())
        _canvas.paste(self.output.pixels, picture, left, top)
        self._taken.append((left, top, left + width, top + height))

    def _canvas_size(self) -> tuple[int, int]:
        height, width = self.output.pixels.shape[:2]
        return width, height

    # ---------------------------------------------------------------- shapes
    def _scaled(self, points: object) -> np.ndarray:
        """Return (P, 2) points in output pixels."""
        return np.asarray(points, dtype=np.float64).reshape(-1, 2) * self.output.scale

    def draw_box(
        self,
        box_coord: Sequence[float],
        alpha: float = 0.5,
        edge_color: ColorLike = "g",
        line_style: str = "-",
    ) -> VisImage:
        """Draw the outline of a box.

        Args:
            box_coord: x0, y0, x1, y1.
            alpha: opacity of the line in [0, 1].
            edge_color: see `to_rgb`.
            line_style: ``-``, ``--``, ``:`` or ``-.``.
        """
        x0, y0, x1, y1 = (float(value) * self.output.scale for value in box_coord)
        if not np.isfinite((x0, y0, x1, y1)).all():
            return self.output
        color = to_bytes(edge_color)
        corners = (x0, y0, x1, y1)
        _canvas.box(self.output.pixels, corners, color, self._line_width, alpha, line_style)
        return self.output

    def draw_rotated_box_with_label(
        self,
        rotated_box: Sequence[float],
        alpha: float = 0.5,
        edge_color: ColorLike = "g",
        line_style: str = "-",
        label: str | None = None,
    ) -> VisImage:
        """Draw a rotated box; its front (top) edge is dashed.

        Args:
            rotated_box: centre x, centre y, width, height, angle in degrees counter-clockwise.
            alpha: opacity of the line in [0, 1].
            edge_color: see `to_rgb`.
            line_style: of the other three edges.
            label: written along the top edge.
        """
        x, y, width, height, angle = (float(value) for value in rotated_box)
        if not np.isfinite((x, y, width, height, angle)).all():
            return self.output
        theta = math.radians(angle)
        cos, sin = math.cos(theta), math.sin(theta)
        halves = [(-width, -height), (-width, height), (width, height), (width, -height)]
        corners = np.array(
            [(x + (sin * h + cos * w) / 2, y + (cos * h - sin * w) / 2) for w, h in halves]
        )
        color = to_bytes(edge_color)
        for index in range(4):
            edge = self._scaled(corners[[index, (index + 1) % 4]])
            style = "--" if index == 3 else line_style
            _canvas.line(self.output.pixels, edge, color, self._line_width, alpha, style)
        if label is not None:
            upright = (angle + 90) % 180 - 90  # never upside down
            left_end = corners[0] if abs((angle - upright) % 360) < 1 else corners[2]
            self.draw_text(
                label, left_end, color=edge_color, horizontal_alignment="left", rotation=upright
            )
        return self.output

    def draw_circle(
        self, circle_coord: Sequence[float], color: ColorLike, radius: float = 3
    ) -> VisImage:
        """Fill a circle.

        Args:
            circle_coord: x, y of the centre.
            color: see `to_rgb`.
            radius: image pixels.
        """
        x, y = self._scaled(circle_coord)[0].tolist()
        if not np.isfinite((x, y, radius)).all():
            return self.output
        byte_color = to_bytes(color)
        _canvas.disc(self.output.pixels, (x, y), radius * self.output.scale, byte_color)
        return self.output

    def draw_line(
        self,
        x_data: Sequence[float],
        y_data: Sequence[float],
        color: ColorLike,
        linestyle: str = "-",
        linewidth: float | None = None,
    ) -> VisImage:
        """Draw a polyline.

        Args:
            x_data: P x coordinates.
            y_data: P y coordinates.
            color: see `to_rgb`.
            linestyle: ``-``, ``--``, ``:`` or ``-.``.
            linewidth: points at 100 dpi and scale 1; default fits the image.
        """
        width = self._line_width
        if linewidth is not None:
            width = max(round(linewidth * _POINT * self.output.scale), 1)
        points = self._scaled(np.stack([np.asarray(x_data), np.asarray(y_data)], axis=1))
        points = points[np.isfinite(points).all(axis=1)]
        if len(points) == 0:
            return self.output
        _canvas.line(self.output.pixels, points, to_bytes(color), width, 1.0, linestyle)
        return self.output

    def draw_polygon(
        self,
        segment: object,
        color: ColorLike,
        edge_color: ColorLike | None = None,
        alpha: float = 0.5,
    ) -> VisImage:
        """Fill a polygon and draw its outline.

        Args:
            segment: (P, 2) points.
            color: of the area.
            edge_color: of the outline; default `color`, darkened where the area is nearly opaque.
            alpha: opacity of the area in [0, 1]; the outline is opaque.
        """
        points = self._scaled(segment)
        points = points[np.isfinite(points).all(axis=1)]
        if len(points) == 0:
            return self.output
        edge = self._edge_color(color, edge_color, alpha)
        thickness = max(self._line_width // 2, 1)
        fill = to_bytes(color)
        _canvas.polygon(self.output.pixels, points, fill, edge, thickness, alpha)
        return self.output

    @staticmethod
    def _edge_color(
        color: ColorLike, edge_color: ColorLike | None, alpha: float
    ) -> tuple[int, int, int]:
        if edge_color is None:
            edge_color = change_brightness(color, -0.6) if alpha > 0.8 else color
        return to_bytes(edge_color)

    # ----------------------------------------------------------------- masks
    def _scaled_mask(self, mask: np.ndarray) -> np.ndarray:
        """Resize a mask to the output's size; its outline stays smooth."""
        import cv2

        width, height = self._canvas_size()
        pixels = np.ascontiguousarray(mask, dtype=bool)
        if pixels.shape == (height, width):
            return pixels
        way = cv2.INTER_AREA if self.output.scale < 1 else cv2.INTER_LINEAR
        return cv2.resize(pixels.view(np.uint8) * 255, (width, height), interpolation=way) > 127

    def _fill_mask(
        self, mask: np.ndarray, color: ColorLike, edge_color: ColorLike | None, alpha: float
    ) -> None:
        """Fill a mask (H, W) of the image's size and draw its outlines, holes included."""
        import cv2

        scaled = self._scaled_mask(mask)
        _canvas.mask_fill(self.output.pixels, scaled, to_bytes(color), alpha)
        contours, _ = cv2.findContours(scaled.view(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        edge = self._edge_color(color, edge_color, alpha)
        thickness = max(self._line_width // 2, 1)
        _canvas.mask_edges(self.output.pixels, contours, edge, thickness)

    def draw_binary_mask(
        self,
        binary_mask: np.ndarray,
        color: ColorLike | None = None,
        *,
        edge_color: ColorLike | None = None,
        text: str | None = None,
        alpha: float = 0.5,
        area_threshold: float | None = 10,
    ) -> VisImage:
        """Draw a mask and write a text in it.

        Args:
            binary_mask: (H, W), non-zero inside.
            color: see `to_rgb`; None: one that fits no other in particular.
            edge_color: of the outline; see `draw_polygon`.
            text: written into the largest part.
            alpha: opacity of the area in [0, 1].
            area_threshold: connected parts of fewer pixels are not drawn.
        """
        import cv2

        mask = np.ascontiguousarray(binary_mask).astype(bool)
        color = palette(len(self._taken)) if color is None else color
        _, parts, stats, _ = cv2.connectedComponentsWithStats(mask.view(np.uint8), connectivity=8)
        kept = stats[:, cv2.CC_STAT_AREA] >= (area_threshold or 0)
        kept[0] = False
        shown = kept[parts]
        if shown.any():
            self._fill_mask(shown, color, edge_color, alpha)
            if text is not None:
                self._draw_text_in_mask(shown, text, color)
        return self.output

    def draw_soft_mask(
        self,
        soft_mask: np.ndarray,
        color: ColorLike | None = None,
        *,
        text: str | None = None,
        alpha: float = 0.5,
    ) -> VisImage:
        """Draw a mask whose opacity differs from pixel to pixel.

        Args:
            soft_mask: (H, W) in [0, 1].
            color: see `to_rgb`.
            text: written where the mask is above 0.5.
            alpha: opacity where `soft_mask` is 1.
        """
        import cv2

        color = palette(len(self._taken)) if color is None else color
        weight: Any = np.ascontiguousarray(soft_mask, dtype=np.float32)
        if weight.shape != self.output.pixels.shape[:2]:
            weight = cv2.resize(weight, self._canvas_size(), interpolation=cv2.INTER_LINEAR)
        weight = np.clip(weight, 0, 1)[..., None] * alpha
        pixels = self.output.pixels
        target = np.array(to_bytes(color), dtype=np.float32)
        pixels[:] = np.round(pixels + (target - pixels) * weight).astype(np.uint8)
        if text is not None:
            self._draw_text_in_mask(np.asarray(soft_mask) > 0.5, text, color)
        return self.output

    def _draw_text_in_mask(self, binary_mask: np.ndarray, text: str, color: ColorLike) -> None:
        """Write a label at the innermost point of the mask's largest part."""
        import cv2

        pixels = np.ascontiguousarray(binary_mask).astype(np.uint8)
        if not pixels.any():
            return
        # a frame of zeros: the picture's border counts as the mask's
        distance = cv2.distanceTransform(np.pad(pixels, 1), cv2.DIST_L2, 3)[1:-1, 1:-1]
        y, x = np.unravel_index(int(distance.argmax()), distance.shape)
        radius = float(distance[y, x])
        box = (x + 0.5 - radius, y + 0.5 - radius, x + 0.5 + radius, y + 0.5 + radius)
        self._draw_label(text, color, box, center=True)
