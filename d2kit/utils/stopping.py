"""What long loops tell and are told: that they go on, and that the system wants them to end."""

import contextlib
import signal
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

__all__ = ["StopAsked", "Work", "ask", "forget", "in_progress", "leave_if_asked", "work"]

_number = 0  # of the signal; 0: nobody has asked


class Work(NamedTuple):
    """A part of a run that a watchdog looks after.

    Args:
        what: for its message, "iteration 7".
        since: by `time.monotonic`, when its step in progress began.
        loader: that it may be waiting for; the images that workers are at are named.
    """

    what: str
    since: float
    loader: Any


_work: Work | None = None


def work() -> Work | None:
    """Return what is in progress in this process."""
    return _work


@contextlib.contextmanager
def in_progress(what: str, loader: Any = None) -> Iterator[None]:
    """Around a step: one that takes longer than the watchdog's time is stuck.

    In a loop each `leave_if_asked` begins a new step.
    """
    global _work  # noqa: PLW0603 what is in progress is the process's
    before = _work
    _work = Work(what, time.monotonic(), loader)
    try:
        yield
    finally:
        _work = before


class StopAsked(BaseException):
    """Ends a loop, such as that of an evaluation, because the process was asked to stop.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def ask(number: int) -> None:
    """Note that signal `number` has come; safe in a signal handler."""
    global _number  # noqa: PLW0603 a signal is the process's
    _number = number


def forget() -> None:
    """Take back what `ask` noted."""
    ask(0)


def leave_if_asked() -> None:
    """Raise, if a signal has come; long loops call it between two images.

    It is a sign of life too, see `in_progress`.

    Raises:
        StopAsked: with the signal's number.
    """
    global _work  # noqa: PLW0603
    if _work is not None:
        _work = _work._replace(since=time.monotonic())
    if _number:
        raise StopAsked(_number)
