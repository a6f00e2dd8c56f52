"""Stages of a pipeline in threads of their own, joined by bounded queues."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

__all__ = ["Background"]

Item = TypeVar("Item")
_WAIT = 0.1  # seconds after which a stage that waits looks whether it was told to stop


class Background(Generic[Item]):
    """Runs an iterable in a thread and hands its items on, at most `depth` ahead.

    An exception of the iterable is raised where its items are consumed. `close` ends the thread.

    Args:
        items: what to run; only the thread touches it.
        depth: items that may wait, >= 1: what bounds the memory.
        name: of the thread, for debuggers.
    """

    def __init__(self, items: Iterable[Item], depth: int, name: str) -> None:
        self._queue: queue.Queue[Item] = queue.Queue(depth)
        self._items = items
        self._stop = threading.Event()
        self._done = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for item in self._items:
                while not self._stop.is_set():
                    try:
                        self._queue.put(item, timeout=_WAIT)
                        break
                    except queue.Full:
                        continue
                if self._stop.is_set():
                    break
        except BaseException as error:  # it belongs to whoever consumes the items
            self._error = error
        finally:
            close = getattr(self._items, "close", None)  # a generator's clean-up, in its thread
            if close is not None:
                close()
            self._done.set()

    def __iter__(self) -> Iterator[Item]:
        while True:
            try:
                yield self._queue.get(timeout=_WAIT)
                continue
            except queue.Empty:
                if not self._done.is_set():
                    continue
            if not self._queue.empty():  # put between the two looks
                continue
            if self._error is not None:
                raise self._error
            return

    def stop(self) -> None:
        """Tell the thread to end after the item at hand."""
        self._stop.set()

    def close(self) -> None:
        """End the thread and wait for it; what it reads from should have been stopped before."""
        self._stop.set()
        self._thread.join()
