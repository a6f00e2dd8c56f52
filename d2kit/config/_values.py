"""Single config values: how text becomes one, and which may replace which."""

from ast import literal_eval
from typing import Any

from d2kit.config._yaml import LEAF_TYPES


def decode(value: Any) -> Any:
    """Return what a string says as a Python literal, and anything else unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return value


def plain_scalar(value: Any) -> Any:
    """Return a numpy or torch scalar as a Python number, and anything else unchanged."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    return value


def _as(kind: type, value: Any, current: Any) -> Any:
    """Return a sequence as a list or tuple; the inner ones too, where they are all of one type."""
    inner = {type(item) for item in current}
    if inner in ({list}, {tuple}):
        like = inner.pop()
        value = [like(item) if isinstance(item, (list, tuple)) else item for item in value]
    return kind(value)


def _kind(value: Any) -> str:
    return "section" if isinstance(value, dict) else type(value).__name__


def coerce(value: Any, raw: Any, current: Any, full: str, where: str) -> Any:
    """Return `value` as it may replace `current`.

    Equal types pass; so does anything for None and None for anything, an int where a float is, a
    list where a tuple is and the reverse. Text for a string key is kept as it was written where it
    happens to be a literal of another type (an output folder named ``2024``).

    Args:
        value: the new value, decoded.
        raw: the new value as it was given.
        current: the value to be replaced.
        full: full name of the key.
        where: file and line, or another source, for the message.

    Raises:
        ValueError: if the types do not agree.
    """
    new, old = type(value), type(current)
    leaves = new in LEAF_TYPES and old in LEAF_TYPES
    if old in (list, tuple) and new in (list, tuple):
        return _as(old, value, current)
    if new is old or (leaves and (value is None or current is None)):
        return value
    if old is float and new is int:
        return float(value)
    if old is str and isinstance(raw, str):
        return raw
    hint = ""
    if old in (list, tuple) and new in (str, int, float):
        hint = f'; for one element write "({value!r},)"'
    raise ValueError(
        f"{where}: {full} expects a {_kind(current)} (now {current!r}), "
        f"got the {_kind(value)} {value!r}{hint}"
    )


def _edits(a: str, b: str, limit: int) -> int:
    """Return the number of inserted, deleted, replaced or swapped characters, at most limit + 1."""
    if abs(len(a) - len(b)) > limit:
        return limit + 1
    rows = [list(range(len(b) + 1))]
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            best = min(rows[-1][j] + 1, row[j - 1] + 1, rows[-1][j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                best = min(best, rows[-2][j - 2] + 1)
            row.append(best)
        rows.append(row)
    return min(rows[-1][-1], limit + 1)


def looks_like_typo(name: str, known: str) -> bool:
    """Tell whether a new key's name is so near a known one that it must be a slip.

    Names that differ in a digit are taken for members of a series (RES4_DILATION beside
    RES5_DILATION).
    """
    a, b = (text.replace("_", "").upper() for text in (name, known))
    if a == b:
        return True
    if [c for c in a if c.isdigit()] != [c for c in b if c.isdigit()]:
        return False
    shorter = min(len(a), len(b))
    if shorter < 4:
        return False
    limit = 2 if shorter >= 8 else 1
    return _edits(a, b, limit) <= limit
