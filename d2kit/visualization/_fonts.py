"""A font for every character of a class name, whatever its script."""

from __future__ import annotations

import logging
import os
import unicodedata
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["VARIABLE", "configured", "length", "runs"]

VARIABLE = "D2KIT_FONT"
"""Environment variable: path of a font file that is looked at first."""

logger = logging.getLogger(__name__)

_TOLD: set[str] = set()
"""First words of characters' names, such as CJK or ARABIC, of which it was told that they lack."""


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
def _on_system(char: str) -> str:
    """Return an installed font that has a character and is drawn at any size; "" if none has."""
    from matplotlib import font_manager

    outlines = _sorted_files()
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
            "fonts (Debian: fonts-noto-cjk, fonts-noto-core, fonts-noto-color-emoji), or name a "
            "file in %s or matplotlib's font.sans-serif",
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


STRIKES = (109, 160, 137, 136, 128, 96, 72, 64, 48, 32)
"""Em heights that fonts of coloured emoji have (Noto 109, Apple 160)."""


class Strike:
    """A font of coloured bitmaps of one size, scaled.

    Args:
        font: of Pillow, at its own size.
        scale: to the height that is wanted.
    """

    def __init__(self, font: Any, scale: float) -> None:
        self._font, self._scale = font, scale

    def getlength(self, text: str) -> float:
        """Return the width in pixels."""
        return float(self._font.getlength(text)) * self._scale

    def getbbox(self, text: str, anchor: str) -> tuple[float, ...]:
        """Return left, top, right, bottom in pixels, from the anchor."""
        return tuple(value * self._scale for value in self._font.getbbox(text, anchor=anchor))

    def paste(self, image: Any, x: float, baseline: float, text: str) -> None:
        """Draw text in its own colours onto an RGBA picture of Pillow."""
        from PIL import Image, ImageDraw

        left, top, right, bottom = self._font.getbbox(text, anchor="ls")
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
    return sum(font(path, pixels).getlength(piece) for piece, path in runs(text, fonts))
