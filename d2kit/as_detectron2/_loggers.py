"""Loggers named after the original are those of d2kit: one level, one terminal, one file."""

from __future__ import annotations

import logging
from typing import Any


class _OneName(dict[str, Any]):
    """The table of loggers, in which ``original.X`` is ``real.X``."""

    def __init__(self, table: dict[str, Any], original: str, real: str) -> None:
        super().__init__(table)
        self._original, self._real = original, real

    def _known(self, name: object) -> object:
        if isinstance(name, str) and name.partition(".")[0] == self._original:
            return self._real + name[len(self._original) :]
        return name

    def __contains__(self, name: object) -> bool:
        return super().__contains__(self._known(name))

    def __getitem__(self, name: str) -> Any:
        return super().__getitem__(str(self._known(name)))

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(str(self._known(name)), value)

    def get(self, name: str, default: Any = None) -> Any:
        return super().get(str(self._known(name)), default)


def serve_loggers(original: str, real: str) -> None:
    """Let ``logging.getLogger("original.X")`` be ``logging.getLogger("real.X")``.

    A logger that somebody made under the original's name before stays theirs, and hands its records
    to ours.

    Args:
        original: name of the package whose loggers are asked for.
        real: name of the package that logs.
    """
    manager = logging.Logger.manager
    if isinstance(manager.loggerDict, _OneName):
        return
    ours = logging.getLogger(real)
    for name, logger in list(manager.loggerDict.items()):
        if name.partition(".")[0] != original or not isinstance(logger, logging.Logger):
            continue
        logger.parent = ours
        if name == original and logger.level != logging.NOTSET:
            ours.setLevel(logger.level)
    manager.loggerDict = _OneName(manager.loggerDict, original, real)
