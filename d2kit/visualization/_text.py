"""Text on small filled plates, and where to put it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

Rect = tuple[int, int, int, int]  # x0, y0, x1, y1 in canvas pixels
_MIN_PIXELS = 6


@lru_cache(maxsize=64)
def _font(pixels: int) -> Any:
    """Load DejaVu Sans (it comes with matplotlib) at an em height of `pixels`."""
    from pathlib import Path

    from matplotlib import get_data_path
    from PIL import ImageFont

    return ImageFont.truetype(str(Path(get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), pixels)


@lru_cache(maxsize=1024)
def plate(
    text: str,
    pixels: int,
    color: tuple[int, int, int],
    background: tuple[int, int, int],
    opacity: float,
    rotation: float = 0.0,
) -> np.ndarray:
    """Draw text on a plate with rounded corners.

    Args:
        text: one or more lines.
        pixels: em height.
        color: of the text, [0, 255].
        background: of the plate, [0, 255].
        opacity: of the plate, [0, 1]; the text is opaque.
        rotation: degrees counter-clockwise.

    Returns:
        (h, w, 4) uint8 RGBA, not to be written to (cached).
    """
    from PIL import Image, ImageDraw

    pixels = max(pixels, _MIN_PIXELS)
    font = _font(pixels)
    ascent, descent = font.getmetrics()
    lines = text.split("\n")
    width = max(int(np.ceil(font.getlength(line))) for line in lines)
    pad = max(round(pixels * 0.18), 1)
    line_height = ascent + descent
    # the font's own leading above capitals is cut: a plate hugs its text
    trim = max(ascent - round(pixels * 0.78) - pad, 0)
    size = (width + 2 * pad + 1, line_height * len(lines) - trim + pad)
    image = Image.new("RGBA", size, (0, 0, 0, 0))
    drawing = ImageDraw.Draw(image)
    fill = (*background, round(opacity * 255))
    drawing.rounded_rectangle(
        (0, 0, size[0] - 1, size[1] - 1), radius=max(pixels // 6, 1), fill=fill
    )
    for row, line in enumerate(lines):
        drawing.text((pad, row * line_height - trim), line, font=font, fill=(*color, 255))
    if rotation:
        image = image.rotate(rotation, expand=True, resample=Image.Resampling.BICUBIC)
    return np.asarray(image)


def fitted(text: str, pixels: int, width: int) -> str:
    """Shorten the first words of a one-line text until its plate is at most `width` wide.

    The last word (the score of a label) is kept: ``"infusion pump 98%"`` -> ``"infus… 98%"``.
    """
    pixels = max(pixels, _MIN_PIXELS)
    room = width - 2 * max(round(pixels * 0.18), 1) - 2
    font = _font(pixels)
    if font.getlength(text) <= room:
        return text
    start, space, end = text.rpartition(" ")
    if not start:
        start, end = text, ""
    while start and font.getlength(f"{start}…{space}{end}") > room:
        start = start[:-1]
    return f"{start.rstrip()}…{space}{end}" if start else end


def paste(canvas: np.ndarray, picture: np.ndarray, x: int, y: int) -> None:
    """Blend an RGBA picture into the canvas; what lies outside is cut off.

    Args:
        canvas: (H, W, 3) uint8, changed in place.
        picture: (h, w, 4) uint8.
        x: left column, may be negative.
        y: top row, may be negative.
    """
    height, width = canvas.shape[:2]
    x0, y0 = max(x, 0), max(y, 0)
    x1, y1 = min(x + picture.shape[1], width), min(y + picture.shape[0], height)
    if x0 >= x1 or y0 >= y1:
        return
    part = picture[y0 - y : y1 - y, x0 - x : x1 - x].astype(np.uint16)
    alpha = part[..., 3:]
    region = canvas[y0:y1, x0:x1]
    region[:] = ((part[..., :3] * alpha + region * (255 - alpha) + 127) // 255).astype(np.uint8)


def inside(x: float, y: float, size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """Shift a plate of `size` (w, h) at (x, y) into the canvas (w, h), left and top first."""
    left = max(min(round(x), canvas[0] - size[0]), 0)
    top = max(min(round(y), canvas[1] - size[1]), 0)
    return left, top


def _overlap(rect: Rect, others: Iterable[Rect]) -> int:
    """Sum of the areas that `rect` shares with each of the others."""
    total = 0
    for other in others:
        width = min(rect[2], other[2]) - max(rect[0], other[0])
        height = min(rect[3], other[3]) - max(rect[1], other[1])
        if width > 0 and height > 0:
            total += width * height
    return total


def place(
    size: tuple[int, int],
    wishes: Sequence[tuple[float, float]],
    taken: Sequence[Rect],
    canvas: tuple[int, int],
) -> tuple[int, int]:
    """Choose the first wish at which a plate overlaps no other; else the one that overlaps least.

    Args:
        size: (w, h) of the plate.
        wishes: top-left corners, best first; each is shifted into the canvas.
        taken: rectangles of the plates already there.
        canvas: (w, h).

    Returns:
        Top-left corner.
    """
    best, least = (0, 0), None
    for wish in wishes:
        x, y = inside(*wish, size, canvas)
        shared = _overlap((x, y, x + size[0], y + size[1]), taken)
        if shared == 0:
            return x, y
        if least is None or shared < least:
            best, least = (x, y), shared
    return best


def wishes_for_box(
    box: tuple[float, float, float, float], size: tuple[int, int], small: bool
) -> list[tuple[float, float]]:
    """List where the label of a box may go.

    Args:
        box: x0, y0, x1, y1 in canvas pixels.
        size: (w, h) of the plate.
        small: the plate would hide the object: outside places come first.
    """
    x0, y0, x1, y1 = box
    width, height = size
    top = [(x0, y0), (x1 - width, y0)]
    above = [(x0, y0 - height), (x1 - width, y0 - height)]
    below = [(x0, y1), (x1 - width, y1)]
    bottom = [(x0, y1 - height), (x1 - width, y1 - height)]
    sides = [(x1, y0), (x0 - width, y0), (x1, y1 - height), (x0 - width, y1 - height)]
    down = [(x0, y0 + k * height) for k in range(1, 5) if y0 + (k + 1) * height <= y1]
    middle = [((x0 + x1 - width) / 2, (y0 + y1 - height) / 2)]
    if small:
        return above + below + sides + top + bottom
    return top + above + down + bottom + below + sides + middle
