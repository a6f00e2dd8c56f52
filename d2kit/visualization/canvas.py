"""Text on small filled plates, and where to put it."""

from __future__ import annotations

import importlib.util
import logging
import os
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from d2kit.utils.text import drawn

if TYPE_CHECKING:
    from PIL import Image
    from PIL.ImageFont import FreeTypeFont

VARIABLE = "D2KIT_FONT"
"""Environment variable: path of a font file that is looked at first."""

logger = logging.getLogger(__name__)

_TOLD: set[str] = set()
"""First words of characters' names, such as CJK or ARABIC, of which it was told that they lack."""

STRIKES = (109, 160, 137, 136, 128, 96, 72, 64, 48, 32)
"""Em heights that fonts of coloured emoji have (Noto 109, Apple 160)."""


def configured() -> tuple[str, ...]:
    """Return the font files that the user's settings name, best first.

    That is the file in the environment's `VARIABLE`, then what is installed of matplotlib's
    ``font.family`` and ``font.sans-serif``, then DejaVu Sans, which comes with matplotlib.
    """
    import matplotlib

    families: list[str] = []
    for name in matplotlib.rcParams["font.family"]:
        settings: Any = matplotlib.rcParams
        generic = settings.get(f"font.{name}")
        families += generic if isinstance(generic, list) else [name]
    own = os.environ.get(VARIABLE, "")
    found: tuple[str, ...] = (own,) if own else ()
    if families[:1] != ["DejaVu Sans"]:  # else the list of installed fonts need not be read
        from matplotlib import font_manager

        before = (
            families[: families.index("DejaVu Sans")] if "DejaVu Sans" in families else families
        )
        found += _installed(tuple(before), len(font_manager.fontManager.ttflist))
    return (*found, _shipped())


@lru_cache(maxsize=1)
def _shipped() -> str:
    from matplotlib import get_data_path

    return str(Path(get_data_path()) / "fonts/ttf/DejaVuSans.ttf")


@lru_cache(maxsize=16)
def _installed(families: tuple[str, ...], _: int) -> tuple[str, ...]:
    """Return the upright regular files of families; `_` is the number of fonts known."""
    return tuple(path for name in families for path in _sorted_files(name)[:1])


def _sorted_files(family: str = "") -> list[str]:
    """Return the files of a family (of all, sans-serif ones first), upright regular ones first."""
    from matplotlib import font_manager

    def rank(entry: Any) -> tuple[bool, bool, int, str]:
        weight = entry.weight if isinstance(entry.weight, int) else 400
        sans = "sans" in entry.name.lower() or "gothic" in entry.name.lower()
        return not sans, entry.style != "normal", abs(weight - 400), entry.name

    known = [e for e in font_manager.fontManager.ttflist if not family or e.name == family]
    # Last Resort has every character, as the same square of its block
    known = [e for e in known if not e.name.startswith("Last Resort")]
    return [entry.fname for entry in sorted(known, key=rank)]


@cache
def _characters(path: str) -> np.ndarray:
    """Return the sorted code points that a font has; none where the file is no font."""
    from matplotlib.ft2font import FT2Font

    try:
        return np.array(sorted(FT2Font(path).get_charmap()), np.int64)
    except (OSError, RuntimeError, UnicodeDecodeError) as error:
        logger.warning("%s cannot be read as a font: %s", path, error)
        return np.zeros(0, np.int64)


def _has(path: str, char: str) -> bool:
    known, code = _characters(path), ord(char)
    place = int(np.searchsorted(known, code))
    return place < len(known) and int(known[place]) == code


@cache
def _packaged() -> list[str]:
    """Return the font of ``pip install d2kit[fonts]``: Noto Sans CJK, SIL Open Font License."""
    spec = importlib.util.find_spec("mplfonts")
    folders = spec.submodule_search_locations if spec else None
    files = [Path(folder) / "fonts/NotoSansCJKsc-Regular.otf" for folder in folders or ()]
    return [str(file) for file in files if file.is_file()]


@cache
def _on_system(char: str) -> str:
    """Return an installed font that has a character and is drawn at any size; "" if none has."""
    from matplotlib import font_manager

    outlines = [*_sorted_files(), *_packaged()]
    for path in outlines:
        if _has(path, char):
            return path
    # matplotlib keeps no bitmap fonts of one size, such as coloured emoji
    for path in sorted(set(font_manager.findSystemFonts()) - set(outlines)):
        if "LastResort" not in path and _has(path, char):
            return path
    name = unicodedata.name(char, "a character")
    if name.split()[0] not in _TOLD:  # a language has hundreds of characters
        _TOLD.add(name.split()[0])
        logger.warning(
            "No font here has %s (U+%04X): numbers are drawn in place of such characters. Install "
            "fonts (Debian: fonts-noto-cjk, fonts-noto-core, fonts-noto-color-emoji; Chinese, "
            "Japanese, Korean also by pip install 'd2kit[fonts]'), or name a file in %s or "
            "matplotlib's font.sans-serif",
            *(name, ord(char), VARIABLE),
        )
    return ""


@lru_cache(maxsize=256)
def font(path: str, pixels: int) -> Any:
    """Return a font of Pillow at an em height of `pixels`, or a `Strike` that is like one."""
    from PIL import ImageFont

    try:
        return ImageFont.truetype(path, pixels)
    except OSError:
        for size in STRIKES:
            try:
                return Strike(ImageFont.truetype(path, size), pixels / size)
            except OSError:
                continue
        raise


class Strike:
    """A font of coloured bitmaps of one size, scaled.

    Args:
        font: of Pillow, at its own size.
        scale: to the height that is wanted.
    """

    def __init__(self, font: FreeTypeFont, scale: float) -> None:
        self._font, self._scale = font, scale

    def getlength(self, text: str) -> float:
        """Return the width in pixels."""
        return float(self._font.getlength(text)) * self._scale

    def getbbox(self, text: str, anchor: str) -> tuple[float, ...]:
        """Return left, top, right, bottom in pixels, from the anchor."""
        return tuple(value * self._scale for value in self._font.getbbox(text, anchor=anchor))

    def paste(self, image: Image.Image, x: float, baseline: float, text: str) -> None:
        """Draw text in its own colours onto an RGBA picture of Pillow."""
        from PIL import Image, ImageDraw

        left, top, right, bottom = map(int, self._font.getbbox(text, anchor="ls"))
        glyphs = Image.new("RGBA", (right - left, bottom - top), (0, 0, 0, 0))
        ImageDraw.Draw(glyphs).text(
            (-left, -top), text, font=self._font, anchor="ls", embedded_color=True
        )
        size = [max(1, round(side * self._scale)) for side in glyphs.size]
        small = glyphs.resize((size[0], size[1]), Image.Resampling.LANCZOS)
        place = (round(x + left * self._scale), round(baseline + top * self._scale))
        image.alpha_composite(small, (max(place[0], 0), max(place[1], 0)))


@lru_cache(maxsize=4096)
def runs(text: str, fonts: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Cut one line into pieces of one font each.

    Args:
        text: without line breaks.
        fonts: files to look at first, see `configured`; then all that is installed.

    Returns:
        (piece, font file); a character that no font has is its number, such as ``[4EBA]``.
    """
    pieces: list[tuple[str, str]] = []
    for last, char in zip(" " + text, text, strict=False):
        before = pieces[-1][1] if pieces else fonts[-1]
        # What joins has no glyph of its own; marks, and what is joined, belong to the letter before
        joins = unicodedata.category(char) == "Cf" or 0xFE00 <= ord(char) <= 0xFE0F
        belongs = last == "\u200d" or unicodedata.category(char) in ("Mn", "Mc", "Me")
        path = before if joins or (belongs and _has(before, char)) else ""
        path = path or next((p for p in fonts if _has(p, char)), "")
        if not path:
            path = before if _has(before, char) else _on_system(char)
        piece = char if path else f"[{ord(char):X}]"
        path = path or fonts[-1]
        if pieces and pieces[-1][1] == path:
            pieces[-1] = (pieces[-1][0] + piece, path)
        else:
            pieces.append((piece, path))
    return tuple(pieces)


def length(text: str, pixels: int, fonts: tuple[str, ...]) -> float:
    """Return the width of one line at an em height of `pixels`."""
    return float(sum(font(path, pixels).getlength(piece) for piece, path in runs(text, fonts)))


Rect = tuple[int, int, int, int]  # x0, y0, x1, y1 in canvas pixels
_MIN_PIXELS = 6


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
        text: one or more lines, that have passed the gate (`d2kit.utils.text`).
        pixels: em height.
        color: of the text, [0, 255].
        background: of the plate, [0, 255].
        opacity: of the plate, [0, 1]; the text is opaque.
        rotation: degrees counter-clockwise.

    Returns:
        (h, w, 4) uint8 RGBA, not to be written to (cached).
    """
    return _plate(text, pixels, color, background, opacity, rotation, configured())


@lru_cache(maxsize=1024)
def _plate(
    text: str,
    pixels: int,
    color: tuple[int, int, int],
    background: tuple[int, int, int],
    opacity: float,
    rotation: float,
    fonts: tuple[str, ...],
) -> np.ndarray:
    """Draw a plate; `fonts` decides on the pixels too, and may change between calls."""
    from PIL import Image, ImageDraw

    pixels = max(pixels, _MIN_PIXELS)
    base = font(fonts[-1], pixels)
    ascent, descent = base.getmetrics()
    lines = [runs(line, fonts) for line in text.split("\n")]
    loaded = [[(piece, font(path, pixels)) for piece, path in line] for line in lines]
    width = max(int(np.ceil(sum(f.getlength(p) for p, f in line))) for line in loaded)
    pad = max(round(pixels * 0.18), 1)
    # the font's own leading above capitals is cut: a plate hugs its text
    trim = max(ascent - round(pixels * 0.78) - pad, 0)
    for piece, face in (item for line in loaded for item in line if item[1] is not base):
        _, top, _, bottom = face.getbbox(piece, anchor="ls")  # scripts may be taller than Latin
        trim = min(trim, ascent + round(top))
        descent = max(descent, round(bottom))
    line_height = ascent + descent
    size = (width + 2 * pad + 1, line_height * len(lines) - trim + pad)
    image = Image.new("RGBA", size, (0, 0, 0, 0))
    drawing = ImageDraw.Draw(image)
    fill = (*background, round(opacity * 255))
    drawing.rounded_rectangle(
        (0, 0, size[0] - 1, size[1] - 1), radius=max(pixels // 6, 1), fill=fill
    )
    for row, line in enumerate(loaded):
        x, baseline = float(pad), row * line_height - trim + ascent
        for piece, face in line:
            if isinstance(face, Strike):
                face.paste(image, x, baseline, piece)
            else:
                drawing.text((x, baseline), piece, font=face, fill=(*color, 255), anchor="ls")
            x += face.getlength(piece)
    if rotation:
        image = image.rotate(rotation, expand=True, resample=Image.Resampling.BICUBIC)
    return np.asarray(image)


def fitted(text: str, pixels: int, width: int) -> str:
    """Shorten the first words of a text until its plate, of one line, is at most `width` wide.

    The last word (the score of a label) is kept: ``"infusion pump 98%"`` -> ``"infus… 98%"``.
    """
    return _fitted(text, pixels, width, configured())


@lru_cache(maxsize=1024)
def _fitted(text: str, pixels: int, width: int, fonts: tuple[str, ...]) -> str:
    pixels = max(pixels, _MIN_PIXELS)
    room = width - 2 * max(round(pixels * 0.18), 1) - 2
    text = drawn(text)
    if length(text, pixels, fonts) <= room:
        return text
    start, space, end = text.rpartition(" ")
    if not start:
        start, end = text, ""
    while start and length(f"{start}…{space}{end}", pixels, fonts) > room:
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


Rgb = tuple[int, int, int]
_SHIFT = 4  # fractional bits of OpenCV's coordinates
_DASHES = {"--": (6.0, 4.0), ":": (1.5, 2.5), "-.": (6.0, 3.0, 1.5, 3.0)}  # lengths / thickness
_STYLE_NAMES = {"solid": "-", "dashed": "--", "dotted": ":", "dashdot": "-."}


def _fixed(points: np.ndarray, x0: int = 0, y0: int = 0) -> np.ndarray:
    """Turn (P, 2) continuous points into OpenCV's fixed-point pixel-centre coordinates."""
    shifted = np.clip(np.asarray(points, dtype=np.float64) - (x0 + 0.5, y0 + 0.5), -3e4, 3e4)
    return np.round(shifted * (1 << _SHIFT)).astype(np.int32)


def _blended(
    canvas: np.ndarray,
    bounds: tuple[float, float, float, float],
    alpha: float,
    draw: Callable[[np.ndarray, int, int], None],
) -> None:
    """Let `draw` paint a copy of the region around `bounds`, then mix it in with `alpha`."""
    import cv2

    height, width = canvas.shape[:2]
    x0, y0 = max(int(bounds[0]) - 2, 0), max(int(bounds[1]) - 2, 0)
    x1, y1 = min(int(bounds[2]) + 3, width), min(int(bounds[3]) + 3, height)
    if x0 >= x1 or y0 >= y1 or alpha <= 0:
        return
    region = canvas[y0:y1, x0:x1]
    painted = region.copy()
    draw(painted, x0, y0)
    if alpha >= 1:
        region[:] = painted
    else:
        region[:] = cv2.addWeighted(painted, alpha, np.ascontiguousarray(region), 1 - alpha, 0)


def _bounds(points: np.ndarray, margin: float) -> tuple[float, float, float, float]:
    low, high = points.min(axis=0) - margin, points.max(axis=0) + margin
    limit = 1e6
    values = np.clip(np.concatenate([low, high]), -limit, limit)
    return float(values[0]), float(values[1]), float(values[2]), float(values[3])


def _dashes(points: np.ndarray, style: str, thickness: int) -> list[np.ndarray]:
    """Cut a polyline (P, 2) into the strokes of a line style."""
    style = _STYLE_NAMES.get(style, style)
    if style not in _DASHES:
        return [points]
    lengths = np.array(_DASHES[style]) * max(thickness, 1)
    steps = np.linalg.norm(np.diff(points, axis=0), axis=1)
    position = np.concatenate([[0.0], np.cumsum(steps)])
    total = position[-1]
    if total == 0 or total / lengths.sum() > 2000:
        return [points]
    strokes = []
    start, index = 0.0, 0
    while start < total:
        end = min(start + lengths[index % len(lengths)], total)
        if index % 2 == 0:
            within = position[(position > start) & (position < end)]
            where = np.concatenate([[start], within, [end]])
            xs = np.interp(where, position, points[:, 0])
            ys = np.interp(where, position, points[:, 1])
            strokes.append(np.stack([xs, ys], axis=1))
        start, index = end, index + 1
    return strokes


def line(
    canvas: np.ndarray, points: np.ndarray, color: Rgb, thickness: int, alpha: float, style: str
) -> None:
    """Draw a polyline through (P, 2) points."""
    import cv2

    def draw(image: np.ndarray, x0: int, y0: int) -> None:
        strokes = [_fixed(stroke, x0, y0) for stroke in _dashes(points, style, thickness)]
        cv2.polylines(image, strokes, False, color, thickness, cv2.LINE_AA, _SHIFT)

    _blended(canvas, _bounds(points, thickness), alpha, draw)


def polygon(
    canvas: np.ndarray, points: np.ndarray, fill: Rgb, edge: Rgb, thickness: int, alpha: float
) -> None:
    """Fill a polygon of (P, 2) points with `alpha` and draw its opaque outline."""
    import cv2

    def draw_fill(image: np.ndarray, x0: int, y0: int) -> None:
        cv2.fillPoly(image, [_fixed(points, x0, y0)], fill, cv2.LINE_AA, _SHIFT)

    def draw_edge(image: np.ndarray, x0: int, y0: int) -> None:
        cv2.polylines(image, [_fixed(points, x0, y0)], True, edge, thickness, cv2.LINE_AA, _SHIFT)

    bounds = _bounds(points, thickness)
    _blended(canvas, bounds, alpha, draw_fill)
    _blended(canvas, bounds, 1.0, draw_edge)


def disc(canvas: np.ndarray, center: tuple[float, float], radius: float, color: Rgb) -> None:
    """Fill a circle."""
    import cv2

    def draw(image: np.ndarray, x0: int, y0: int) -> None:
        x, y = _fixed(np.array([center]), x0, y0)[0].tolist()
        cv2.circle(image, (x, y), round(radius * (1 << _SHIFT)), color, -1, cv2.LINE_AA, _SHIFT)

    _blended(canvas, _bounds(np.array([center]), radius + 1), 1.0, draw)


def box(
    canvas: np.ndarray,
    corners: tuple[float, float, float, float],
    color: Rgb,
    thickness: int,
    alpha: float,
    style: str,
) -> None:
    """Draw an upright rectangle; its line lies inside the box and stays in the canvas."""
    height, width = canvas.shape[:2]
    x0, x1 = sorted(min(max(round(v), 0), width) for v in (corners[0], corners[2]))
    y0, y1 = sorted(min(max(round(v), 0), height) for v in (corners[1], corners[3]))
    x0, y0 = min(x0, width - 1), min(y0, height - 1)
    x1, y1 = max(x1, x0 + 1), max(y1, y0 + 1)
    large = min(x1 - x0, y1 - y0) > 4 * thickness
    if large and _STYLE_NAMES.get(style, style) in _DASHES:
        half = thickness / 2
        a, b, c, d = x0 + half, y0 + half, x1 - half, y1 - half
        line(
            canvas,
            np.array([(a, b), (c, b), (c, d), (a, d), (a, b)]),
            color,
            thickness,
            alpha,
            style,
        )
        return
    t = max(min(thickness, (x1 - x0 + 1) // 2, (y1 - y0 + 1) // 2), 1)
    strips = [(y0, y0 + t, x0, x1), (max(y1 - t, y0 + t), y1, x0, x1)]
    rest = (min(y0 + t, y1), max(y1 - t, y0 + t))
    strips += [(*rest, x0, x0 + t), (*rest, max(x1 - t, x0 + t), x1)]
    for top, bottom, left, right in strips:
        region = canvas[top:bottom, left:right]
        if region.size:
            region[:] = np.round(region * (1 - alpha) + np.array(color) * alpha).astype(np.uint8)


def mask_fill(canvas: np.ndarray, mask: np.ndarray, color: Rgb, alpha: float) -> None:
    """Mix `color` with `alpha` into the pixels of a bool mask of the canvas's size."""
    import cv2

    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if len(rows) == 0:
        return
    window = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    region = np.ascontiguousarray(canvas[window])
    tables = np.arange(256)[:, None] * (1 - alpha) + np.array(color)[None] * alpha
    mixed = cv2.LUT(region, np.round(tables).astype(np.uint8)[None])
    chosen = np.ascontiguousarray(mask[window]).view(np.uint8)
    canvas[window] = cv2.copyTo(mixed, chosen, region.copy())


def mask_edges(
    canvas: np.ndarray, contours: Sequence[np.ndarray], color: Rgb, thickness: int
) -> None:
    """Draw the closed contours (each (P, 1, 2) int, as OpenCV gives them) of a mask."""
    import cv2

    drawn = np.ascontiguousarray(canvas)
    cv2.polylines(drawn, list(contours), True, color, thickness, cv2.LINE_AA)
    if drawn is not canvas:
        canvas[:] = drawn
