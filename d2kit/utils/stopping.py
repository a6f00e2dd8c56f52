"""The wish of a system that a run ends, for long loops that are no training steps."""

import signal

__all__ = ["StopAsked", "ask", "forget", "leave_if_asked"]

_number = 0  # of the signal; 0: nobody has asked


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

    Raises:
        StopAsked: with the signal's number.
    """
    if _number:
        raise StopAsked(_number)
