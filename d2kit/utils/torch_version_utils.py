"""Comparison of versions, under the name that user code imports it by."""

from typing import Any

__all__ = ["min_torch_version"]


def min_torch_version(min_version: str) -> bool:
    """Tell whether torch is at least of a version.

    Args:
        min_version: for example "2.10".
    """
    import torch

    return _numbers(torch.__version__) >= _numbers(min_version)


def _numbers(version: Any) -> tuple[int, ...]:
    """Return the leading numbers of a version: (2, 14, 1) of "2.14.1+cu130"."""
    parts = []
    for part in str(version).split("+")[0].split("."):
        if not part.isdigit():
            break
        parts.append(int(part))
    return tuple(parts)
