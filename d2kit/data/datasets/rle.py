"""Checks of run-length masks, before any C code sees them.

A mask of COCO is a list of run lengths, background first, in column-major order; "compressed" it is
text of 6 bits per character, 5 of which are data, and from the fourth run on each number is the
difference from the run two before. pycocotools trusts such text, and a wrong one can end the
process.
"""

from typing import Any

import numpy as np

__all__ = ["decode_counts", "rle_problem"]

FIRST, LAST = 48, 111
"""Range of the characters of compressed runs."""

MAX_DIGITS = 7
"""Characters of one number: 35 bits are more than any image has pixels."""


def decode_counts(text: str | bytes) -> np.ndarray:
    """Decode compressed run lengths.

    Args:
        text: the "counts" of a compressed mask.

    Returns:
        (n,) int64 run lengths.

    Raises:
        ValueError: not of that form.
    """
    raw = text.encode("ascii") if isinstance(text, str) else text
    codes = np.frombuffer(raw, dtype=np.uint8).astype(np.int64)
    if len(codes) == 0:
        return codes
    if codes.min() < FIRST or codes.max() > LAST:
        raise ValueError("a character outside of the code")
    codes -= FIRST
    last = (codes & 0x20) == 0
    if not last[-1]:
        raise ValueError("it ends within a number")
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    digits = ends - starts + 1
    if digits.max() > MAX_DIGITS:
        raise ValueError("a number is too long")
    place = np.arange(len(codes)) - np.repeat(starts, digits)
    values = np.add.reduceat((codes & 0x1F) << (5 * place), starts)
    negative = (codes[ends] & 0x10) != 0
    values[negative] -= 1 << (5 * digits[negative])
    # Differences to the run two before, from the fourth run on: two interleaved running sums.
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def rle_problem(mask: dict[str, Any], height: int, width: int) -> str | None:
    """Say what is wrong with a run-length mask.

    Args:
        mask: {"size": [height, width], "counts": list of integers, or text}.
        height: of the image in pixels; 0 where it is not known.
        width: of the image in pixels.

    Returns:
        None where nothing is.
    """
    size, counts = mask.get("size"), mask.get("counts")
    if not (isinstance(size, list) and len(size) == 2 and all(type(s) is int for s in size)):
        return f"a run-length mask needs 'size': [height, width], got {size!r}"
    if height and size != [height, width]:
        return f"run-length mask of size {size} in an image of size {[height, width]}"
    if isinstance(counts, (str, bytes)):
        try:
            runs = decode_counts(counts)
        except ValueError as error:
            return f"run-length mask with damaged 'counts': {error}"
    elif isinstance(counts, list) and all(type(c) is int for c in counts):
        if any(not 0 <= c < 2**31 for c in counts):
            return "run-length mask with a run that is negative or longer than any image"
        runs = np.array(counts, dtype=np.int64)
    else:
        return "a run-length mask needs 'counts': text, or a list of integers"
    if len(runs) and runs.min() < 0:
        return "run-length mask with a negative run"
    if runs.sum() != size[0] * size[1]:
        return f"run-length mask with {runs.sum()} pixels instead of {size[0]} x {size[1]}"
    return None
