"""Reads rows of tracks from MOT text and JSON of others: each number is bounded, each error named.

MOT text has one line for a box: ``frame,id,left,top,width,height[,score[,class[,visibility]]]``,
frames from 1. MOT15 and the results of trackers have ten columns, of which the last three are
coordinates in the world or -1: no class. Source: Leal-Taixé et al. 2015 (arXiv 1504.01942), Milan
et al. 2016 (arXiv 1603.00831).
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from d2kit.utils.text import one_line

__all__ = ["PEDESTRIAN", "Row", "checked_row", "read_mot_text"]

logger = logging.getLogger(__name__)

PEDESTRIAN = 1  # the class that counts
COLUMNS = ("frame", "id", "left", "top", "width", "height", "score", "class")
WITHOUT_CLASS = 10  # columns of the form whose eighth is no class
MOST_FRAMES = 3_000_000  # 33 hours at 25 frames a second; each is looked at
MOST_BYTES = 2 << 30
LARGEST = 1e7  # pixels


class Row(NamedTuple):
    """A box of a track: frame from 1, identity, left, top, width, height in pixels.

    Args:
        score: 0 in ground truth marks a box that does not count.
        kind: class of MOT16 and later; `PEDESTRIAN` counts.
    """

    frame: int
    identity: int
    x: float
    y: float
    width: float
    height: float
    score: float = 1.0
    kind: int = PEDESTRIAN

    @property
    def counts(self) -> bool:
        """Whether the box is one of the objects, and not one to be left out."""
        return self.score != 0 and self.kind == PEDESTRIAN


def checked_row(values: dict[str, Any], where: str) -> Row:
    """Make a row of numbers or text.

    Args:
        values: column -> value, see `COLUMNS`; ``score`` and ``class`` may be missing.
        where: file and line or id, for the message.

    Raises:
        ValueError: if a value is missing, no number, or out of bounds.
    """
    numbers = {name: _number(value, name, where) for name, value in values.items()}
    for name in ("frame", "id", "class"):
        if not numbers.get(name, 0.0).is_integer():
            raise ValueError(f"{where}: {name} must be a whole number, got {numbers[name]:g}")
    missing = [name for name in COLUMNS[:6] if name not in numbers]
    if missing:
        raise ValueError(f"{where}: has no {', '.join(missing)}")
    frame = int(numbers["frame"])
    if not 1 <= frame <= MOST_FRAMES:
        raise ValueError(f"{where}: frame must be in [1, {MOST_FRAMES:,}], got {frame:,}")
    box = [numbers[name] for name in ("left", "top", "width", "height")]
    if max(map(abs, box)) > LARGEST or min(box[2:]) <= 0:
        raise ValueError(
            f"{where}: width and height must be positive and no number beyond {LARGEST:g} pixels, "
            f"got left, top, width, height {', '.join(f'{x:g}' for x in box)}"
        )
    kind = int(numbers.get("class", PEDESTRIAN))
    return Row(
        frame,
        int(numbers["id"]),
        x=box[0],
        y=box[1],
        width=box[2],
        height=box[3],
        score=numbers.get("score", 1.0),
        kind=PEDESTRIAN if kind == -1 else kind,
    )


def _number(value: Any, name: str, where: str) -> float:
    """Return a finite number of at most 2 ** 53, which a float holds exactly."""
    try:
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise TypeError
        if isinstance(value, str) and (len(value) > 100 or not value.isascii() or "_" in value):
            raise ValueError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        shown = one_line(value if isinstance(value, str) else type(value).__name__, 40)
        raise ValueError(f"{where}: {name} must be a number, got '{shown}'") from None
    if not math.isfinite(number) or abs(number) > 1 << 53:
        raise ValueError(f"{where}: {name} must be finite and below 2**53, got {number:g}")
    return number


def read_mot_text(path: Path) -> list[Row]:
    """Read MOT text.

    Args:
        path: lines of 6 or more columns, between commas, semicolons, blanks or tabs.

    Returns:
        All rows, those that do not count too; empty for an empty file.

    Raises:
        ValueError: for a line that is none, naming file, line, column and value; for an identity
            twice in a frame.
    """
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size:,} bytes; expected at most {MOST_BYTES:,}")
    rows: list[Row] = []
    separator: str | None = None
    places: dict[tuple[int, int], int] = {}
    with open(path, encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    if not rows:
                        separator = next((s for s in (",", ";") if s in line), None)
                    rows.append(_row_of_line(line, separator, f"{path}, line {number}"))
                    key = rows[-1][:2]
                    if places.setdefault(key, number) != number:
                        raise ValueError(
                            f"{path}, line {number}: id {key[1]} is twice in frame {key[0]}, also "
                            f"in line {places[key]}"
                        )
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}, behind line {len(rows)}: not UTF-8 text ({error.reason}); expected MOT "
                "text"
            ) from error
    left_out = Counter(row.kind for row in rows if not row.counts)
    if left_out:
        kinds = ", ".join(f"{count:,} of class {kind}" for kind, count in left_out.most_common(5))
        logger.warning(
            "%s: %d of %d lines are no pedestrians (class 1) or are marked to be left out (score "
            "0): %s",
            path,
            left_out.total(),
            len(rows),
            kinds,
        )
    return rows


def _row_of_line(line: str, separator: str | None, where: str) -> Row:
    """Read one line; without a separator its cells are apart by blanks or tabs."""
    text = line.strip().rstrip(",;")
    cells = text.split(separator) if separator else re.split(r"\s+", text)
    cells = [cell.strip() for cell in cells]
    if len(cells) < 6:
        raise ValueError(
            f"{where}: expected at least 6 columns (frame, id, left, top, width, height), got "
            f"{len(cells)}: {one_line(text, 60)}"
        )
    columns = COLUMNS if len(cells) < WITHOUT_CLASS else COLUMNS[:7]
    return checked_row(dict(zip(columns, cells, strict=False)), where)
