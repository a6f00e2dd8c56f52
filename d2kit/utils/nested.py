"""Nested mappings, such as configs."""

from collections.abc import Mapping
from typing import Any

__all__ = ["flatten"]


def flatten(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return full key, ``A.B.C``, -> value of what is no mapping itself.

    Args:
        node: keys are text.
        prefix: put before each key.
    """
    found: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, Mapping):
            found |= flatten(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
