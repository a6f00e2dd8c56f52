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
    for path in _sorted_files():
        if _has(path, char):
            try:
                font(path, 12)
            except OSError:  # a bitmap font of one size, such as coloured emoji
                continue
            return path
    logger.warning(
        "No font here has %s (U+%04X): its number is drawn. Install a font of its script (such as "
        "the package fonts-noto-cjk), or name a file in %s or matplotlib's font.sans-serif",
        unicodedata.name(char, "a character"),
        ord(char),
        VARIABLE,
    )
    return ""


@lru_cache(maxsize=256)
def font(path: str, pixels: int) -> Any:
    """Return a font of Pillow at an em height of `pixels`."""
    from PIL import ImageFont

    return ImageFont.truetype(path, pixels)


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
    for char in text:
        before = pieces[-1][1] if pieces else fonts[-1]
        joins = unicodedata.combining(char) or unicodedata.category(char) in ("Cf", "Mn", "Me")
        path = before if joins and not _has(before, char) else ""
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
