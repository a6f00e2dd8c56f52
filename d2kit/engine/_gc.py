"""Keeps Python's garbage collector still while modules load."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["paused_gc"]


@contextmanager
def paused_gc() -> Iterator[None]:
    """Collect no garbage within the block.

    A full collection walks all objects of torch: 0.19 s, more than our modules take to load, and
    it was triggered by them every time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
