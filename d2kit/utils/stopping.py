"""What long loops tell and are told: that they go on, and that the system wants them to end."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

__all__ = ["StopAsked", "Work", "ask", "forget", "in_progress", "leave_if_asked", "wait", "work"]

_number = 0  # of the signal; 0: nobody has asked
_since: float | None = None  # when a signal came that may end a wait, by `time.monotonic`
_waiting = False
_reminder: threading.Timer | None = None
PATIENCE = 4.0
"""Seconds that a wait may go on after a signal, so that a step in progress is finished."""


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
def in_progress(what: str, loader: object = None) -> Iterator[None]:
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


def ask(number: int, *, at_once: bool = False) -> None:
    """Note that signal `number` has come; called by its handler.

    Args:
        number: of the signal.
        at_once: end a `wait` of this process that goes on for `PATIENCE` after the signal.

    Raises:
        StopAsked: within such a `wait`.
    """
    global _number, _since  # noqa: PLW0603 a signal is the process's
    if number and at_once and _since is None:
        _since = time.monotonic()
    _number = number
    if _waiting and _since is not None:
        if time.monotonic() - _since >= PATIENCE:
            raise StopAsked(number)
        _remind()


def _remind() -> None:
    """Send the signal again when patience ends: only a handler can end a wait."""
    global _reminder  # noqa: PLW0603
    if _reminder is None:
        _reminder = threading.Timer(PATIENCE, os.kill, (os.getpid(), _number))
        _reminder.daemon = True
        _reminder.start()


@contextlib.contextmanager
def wait() -> Iterator[None]:
    """Around a wait before anything has changed, such as that for a batch.

    Raises:
        StopAsked: when a signal that ends waits has come some seconds ago.
    """
    global _waiting, _reminder  # noqa: PLW0603
    _waiting = True
    try:
        if _since is not None:
            _remind()
        yield
    finally:
        _waiting = False
        if _reminder is not None:
            _reminder.cancel()
            _reminder = None


def forget() -> None:
    """Take back what `ask` noted."""
    global _number, _since  # noqa: PLW0603
    _number, _since = 0, None


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
