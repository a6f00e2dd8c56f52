"""Finds reference vectors: small ones in tests/support/reference, the rest beside the checkout."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent
PLACES = (HERE / "reference", HERE.parents[2] / "shared/reference")


def reference_path(relative: str) -> Path:
    """Return the path of reference file `relative`; skip the calling test where it is absent."""
    for place in PLACES:
        if (place / relative).exists():
            return place / relative
    pytest.skip(f"reference vector {relative} is not on this machine (looked in {PLACES})")
