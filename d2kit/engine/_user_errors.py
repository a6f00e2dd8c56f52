"""Prints a user's mistake as one message instead of a traceback."""

import os
import sys
import traceback
from contextlib import ContextDecorator
from types import TracebackType

from d2kit.utils import comm

__all__ = ["user_errors"]

DEBUG_VARIABLE = "D2KIT_DEBUG"
MISTAKES = (ValueError, KeyError, OSError)
# Where the messages that we write come from; elsewhere such an exception is a bug.
PACKAGES = ("d2kit", "project", "__main__")


class user_errors(ContextDecorator):  # noqa: N801 - used like a function
    """Context manager and decorator for the main function of a script.

    A `ValueError`, `KeyError` or `OSError` (which `FileNotFoundError` is) that the library raised
    becomes one printed message and exit code 1. All else passes.

    Args:
        debug: let the exception pass, for its traceback; so does ``D2KIT_DEBUG=1``.
    """

    def __init__(self, *, debug: bool = False) -> None:
        self.debug = debug

    def __enter__(self) -> "user_errors":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not isinstance(error, MISTAKES) or not _is_ours(trace):
            return
        if self.debug or os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0"):
            return
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        rank = f"[rank {comm.get_rank()}] " if comm.get_rank() else ""
        print(f"{rank}error: {text}", file=sys.stderr)
        if not rank:
            print(f"(for the traceback: {DEBUG_VARIABLE}=1)", file=sys.stderr)
        raise SystemExit(1) from None


def _is_ours(trace: TracebackType | None) -> bool:
    """Tell whether the innermost frame is our code or the script itself, not another library."""
    frames = list(traceback.walk_tb(trace))
    if not frames:
        return False
    name = frames[-1][0].f_globals.get("__name__", "")
    return name.partition(".")[0] in PACKAGES
