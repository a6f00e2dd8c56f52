"""One run at a time in a folder."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["sole_writer"]

_NAME = ".running"


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes of this program; a dead one does not hold it.

    Args:
        folder: must exist; ``.running`` in it names the process.

    Raises:
        ValueError: if another process holds it.
    """
    import portalocker

    path = folder / _NAME
    with path.open("a+", encoding="utf-8") as file:
        flags = portalocker.LockFlags.EXCLUSIVE | portalocker.LockFlags.NON_BLOCKING
        try:
            portalocker.lock(file, flags)
        except portalocker.LockException as error:
            file.seek(0)
            raise ValueError(
                f"--output {folder}: {file.read().strip() or 'another process'} is writing there; "
                "wait for it, or choose another folder"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
