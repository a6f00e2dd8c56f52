"""Loggers: one line per record on the terminal of rank 0 and in a file of every rank."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from d2kit.utils.text import one_line

__all__ = [
    "create_small_table",
    "log_every_n",
    "log_every_n_seconds",
    "log_first_n",
    "setup_logger",
]


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


_COUNTS: Counter[Hashable] = Counter()
_LAST_TIMES: dict[Hashable, float] = {}
_RED, _BOLD_RED = "\033[31m", "\033[1;31m"
_COLOURS = {logging.WARNING: _RED, logging.ERROR: _BOLD_RED, logging.CRITICAL: _BOLD_RED}
_GREEN, _END = "\033[32m", "\033[0m"


class _Formatter(logging.Formatter):
    """Time, place and message; warnings carry their level's name and, on a terminal, a colour."""

    def __init__(self, name: str, abbrev_name: str, *, colour: bool) -> None:
        head = "[%(asctime)s %(shortname)s]: "
        super().__init__(f"{_GREEN}{head}{_END}%(message)s" if colour else f"{head}%(message)s")
        self.datefmt = "%m/%d %H:%M:%S"
        self._name, self._abbrev, self._colour = name, abbrev_name, colour

    def format(self, record: logging.LogRecord) -> str:
        own = record.name == self._name or record.name.startswith(self._name + ".")
        record.shortname = self._abbrev + record.name[len(self._name) :] if own else record.name
        return super().format(record)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        line = "\n".join(one_line(part, None, shown=True) for part in record.message.split("\n"))
        if line != record.message:
            record.message = line  # no escape sequence of a name reaches a terminal
        line = super().formatMessage(record)
        if record.levelno < logging.WARNING:
            return line
        start = _COLOURS.get(record.levelno, "") if self._colour else ""
        return f"{start}{record.levelname}{_END if start else ''} {line}"


def _log_file(output: str, rank: int) -> Path:
    path = Path(output)
    if path.suffix not in (".txt", ".log"):
        path /= "log.txt"
    if rank > 0:
        path = path.with_name(f"{path.name}.rank{rank}")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


class _LogFile(logging.FileHandler):
    """A file whose failures, such as a full disk, are one line on standard error."""

    _told = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 the name of logging
        """Tell the first failure; the run goes on."""
        error = sys.exc_info()[1]
        if isinstance(error, OSError) and not self._told:
            self._told = True
            reason = f"{error.strerror or error}; the run goes on, and this is told once"
            print(f"{self.baseFilename} could not be written: {reason}", file=sys.stderr)
        elif not isinstance(error, OSError):  # a bug in the call
            super().handleError(record)


def setup_logger(
    output: str | None = None,
    distributed_rank: int = 0,
    *,
    color: bool = True,
    name: str = "d2kit",
    abbrev_name: str | None = None,
    enable_propagation: bool = False,
    configure_stdout: bool = True,
) -> logging.Logger:
    """Make a logger print on standard output (rank 0) and append to a file (every rank).

    Calling it again changes nothing that is there already and adds what is new.

    Args:
        output: a file ending in ``.txt`` or ``.log``, or a folder that gets ``log.txt``; ranks
            above 0 append ``.rank<N>``. None writes no file.
        distributed_rank: rank of this process.
        color: colour the terminal output, where it is a terminal.
        name: root name of the logger.
        abbrev_name: printed instead of `name`; None keeps the name.
        enable_propagation: hand records to the parent loggers too.
        configure_stdout: print on standard output.

    Returns:
        The logger.
    """
    logger = logging.getLogger(name)
    logger.setLevel(logging.DEBUG)
    logger.propagate = enable_propagation
    abbrev = name if abbrev_name is None else abbrev_name
    existing = {getattr(handler, "d2kit_key", None) for handler in logger.handlers}

    def add(handler_key: str, make: Callable[[], logging.Handler], *, colour: bool) -> None:
        if handler_key in existing:
            return
        try:
            handler = make()
        except OSError as error:  # of the file: a folder, a pipe, not to be written
            print(f"no log file ({error}); the run goes on without it", file=sys.stderr)
            return
        handler.setLevel(logging.DEBUG)
        handler.setFormatter(_Formatter(name, abbrev, colour=colour))
        handler.d2kit_key = handler_key  # type: ignore[attr-defined]
        logger.addHandler(handler)

    if configure_stdout and distributed_rank == 0:
        terminal = color and sys.stdout.isatty()
        add("stdout", lambda: logging.StreamHandler(sys.stdout), colour=terminal)
    if output is not None:
        path = _log_file(output, distributed_rank).resolve()
        if path.is_fifo():
            print(f"no log file: {path} is a pipe, which would be waited for", file=sys.stderr)
            return logger
        add(f"file:{path}", lambda: _LogFile(path, encoding="utf-8"), colour=False)
    return logger


def _caller() -> tuple[str, tuple[str, int, str]]:
    """Return the module name and the place of the nearest frame outside this file."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    if frame is None:
        return "d2kit", ("", 0, "")
    module = frame.f_globals.get("__name__", "d2kit")
    name = "d2kit" if module == "__main__" else module
    return name, (frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)


def log_first_n(
    lvl: int,
    msg: str,
    n: int = 1,
    *,
    name: str | None = None,
    key: str | tuple[str, ...] = "caller",
) -> None:
    """Log only the first `n` times.

    Args:
        lvl: level, for example ``logging.WARNING``.
        msg: the message.
        n: number of times.
        name: the logger; None means that of the calling module.
        key: what counts as the same: ``"caller"`` (the calling line), ``"message"``, or both.

    Raises:
        ValueError: if `key` holds anything else.
    """
    keys = (key,) if isinstance(key, str) else tuple(key)
    if not keys or set(keys) - {"caller", "message"}:
        raise ValueError(f"log_first_n: key must be 'caller', 'message' or both, got {key!r}")
    module, place = _caller()
    parts: dict[str, Hashable] = {"caller": place, "message": msg}
    identity = ("first", *(parts[k] for k in keys))
    _COUNTS[identity] += 1
    if _COUNTS[identity] <= n:
        logging.getLogger(name or module).log(lvl, msg)


def log_every_n(lvl: int, msg: str, n: int = 1, *, name: str | None = None) -> None:
    """Log at the first of every `n` calls from the same line.

    Args:
        lvl: level.
        msg: the message.
        n: calls per logged message.
        name: the logger; None means that of the calling module.
    """
    module, place = _caller()
    identity = ("every", place)
    _COUNTS[identity] += 1
    if (_COUNTS[identity] - 1) % n == 0:
        logging.getLogger(name or module).log(lvl, msg)


def log_every_n_seconds(lvl: int, msg: str, n: float = 1, *, name: str | None = None) -> None:
    """Log at most once in `n` seconds from the same line.

    Args:
        lvl: level.
        msg: the message.
        n: seconds.
        name: the logger; None means that of the calling module.
    """
    module, place = _caller()
    now = time.monotonic()
    if now - _LAST_TIMES.get(place, -math.inf) >= n:
        _LAST_TIMES[place] = now
        logging.getLogger(name or module).log(lvl, msg)


def create_small_table(small_dict: Mapping[str, Any]) -> str:
    """Format a few named numbers as a table of one row.

    Args:
        small_dict: column name -> number or string.

    Returns:
        The table, pipe-separated with a header, floats with three decimals.
    """
    from tabulate import tabulate

    return tabulate(
        [list(small_dict.values())],
        headers=list(small_dict),
        tablefmt="pipe",
        floatfmt=".3f",
        stralign="center",
        numalign="center",
    )


def _log_api_usage(identifier: str) -> None:
    """Tell torch's usage hook (empty unless a site installs one) that a component is used."""
    torch._C._log_api_usage_once(f"d2kit.{identifier}")
