"""Colours as (red, green, blue) in [0, 1]."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import Any

Color = tuple[float, float, float]

_OFF_WHITE: Color = (1.0, 1.0, 240.0 / 255)
_BLACK: Color = (0.0, 0.0, 0.0)
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


def to_rgb(color: Any) -> Color:
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


def to_bytes(color: Any) -> tuple[int, int, int]:
    """Return a colour as three integers in [0, 255]."""
    red, green, blue = to_rgb(color)
    return round(red * 255), round(green * 255), round(blue * 255)


def change_brightness(color: Any, factor: float) -> Color:
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
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def text_color_on(background: Color) -> Color:
    """Return black or white, whichever contrasts more with `background` (WCAG 2.1)."""
    return _BLACK if (luminance(background) + 0.05) ** 2 > 1.05 * 0.05 else (1.0, 1.0, 1.0)


def lightened(color: Any, least: float = 0.3) -> Color:
    """Mix in white until the luminance is at least `least`, so that text shows on black."""
    rgb = to_rgb(color)
    for step in range(21):
        mixed = _mix(rgb, step / 20)
        if luminance(mixed) >= least:
            return mixed
    return (1.0, 1.0, 1.0)


def jitter(color: Any, index: int) -> Color:
    """Vary a colour a little, so that instances of one class can be told apart.

    Args:
        color: see `to_rgb`.
        index: the instance; the same index always varies a colour the same way, 0 not at all.
    """
    hue, lightness, saturation = colorsys.rgb_to_hls(*to_rgb(color))
    steps = ((index * _GOLDEN) % 1.0, (index * _GOLDEN * _GOLDEN) % 1.0)
    shift = [2 * s - 1 if index else 0.0 for s in steps]
    lightness = min(max(lightness + 0.14 * shift[0], 0.1), 0.9)
    return colorsys.hls_to_rgb((hue + 0.03 * shift[1]) % 1.0, lightness, saturation)


def _mix(color: Color, white: float) -> Color:
    mixed: Sequence[float] = [channel + (1.0 - channel) * white for channel in color]
    return (mixed[0], mixed[1], mixed[2])
