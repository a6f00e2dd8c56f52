"""What accompanies a training, and must not end it."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["auxiliary"]

logger = logging.getLogger(__name__)
_told: set[tuple[int, str]] = set()


@contextmanager
def auxiliary(what: str | os.PathLike[str]) -> Iterator[None]:
    """Around the writing of a log, picture, event file or pointer: a failure is one warning.

    Weights and results are the product of a run and do not belong here. The warning is told once
    for each `what` in a process, however often it fails.

    Args:
        what: the path, or the thing, for the message.

    Example:
        >>> with auxiliary("metrics.json"):
        ...     raise OSError(28, "No space left on device")
    """
    try:
        yield
    except Exception as error:
        key = (os.getpid(), str(what))
        if key in _told:
            return
        _told.add(key)
        reason = str(error) or "no message"
        logger.warning(
            "%s could not be written (%s: %s); the run goes on without it, and this is told once",
            what,
            type(error).__name__,
            reason,
        )
