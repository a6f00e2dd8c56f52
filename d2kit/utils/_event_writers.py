"""Writers: they read the current `EventStorage` and put its values into files and logs."""

import datetime
import io
import json
import logging
import math
import os
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from typing import IO, Any

import torch

from d2kit.utils._event_storage import EventStorage, get_event_storage
from d2kit.utils.file_io import PathManager, atomic_write


class EventWriter(ABC):
    """Something that writes the values of the current `EventStorage` when `write` is called."""

    @abstractmethod
    def write(self) -> None:
        """Write what is new."""

    def continue_from(self, iteration: int) -> None:  # noqa: B027 not every medium can forget
        """Forget what was written of `iteration` and later, which will come again."""

    def close(self) -> None:  # noqa: B027 a writer without files has nothing to do
        """Release files; nothing by default."""


def _open_for_appending(path: str) -> IO[str]:
    """Open a file of lines at its end; an unfinished last line (of a killed process) is cut off."""
    local = PathManager.get_local_path(path) if PathManager.exists(path) else path
    if os.path.exists(local):
        with open(local, "rb+") as file:
            content = file.read()
            if content and not content.endswith(b"\n"):
                file.truncate(content.rfind(b"\n") + 1)
    stream: IO[str] = PathManager.open(path, "a")
    return stream


def _iteration_of(line: str) -> float:
    """Return the iteration that a line of ``metrics.json`` is of; -1 if it is of none."""
    try:
        found = json.loads(line).get("iteration", -1)
    except (ValueError, AttributeError):
        return -1
    return found if isinstance(found, int) else -1


class JSONWriter(EventWriter):
    """Appends one JSON object per line: ``{"iteration": 19, "total_loss": 1.2, ...}``.

    A value stands in the line of the iteration that it was put at, whenever `write` is called.
    NaN and infinity, which JSON does not know, are written as null.

    Args:
        json_file: path of the file; an existing one is continued.
        window_size: iterations of the median for scalars with a smoothing hint.
    """

    def __init__(self, json_file: str, window_size: int = 20) -> None:
        self._path = str(json_file)
        self._file = _open_for_appending(self._path)
        self._window_size = window_size
        self._last_write = -1

    def continue_from(self, iteration: int) -> None:
        """Remove the lines of `iteration` and later, where a killed run was ahead of its resume."""
        if not isinstance(self._file, io.TextIOWrapper) or not os.path.isfile(self._path):
            return
        with open(self._path, encoding="utf-8") as file:
            lines = file.readlines()
        kept = [line for line in lines if _iteration_of(line) < iteration]
        self._last_write = max(int(_iteration_of(line)) for line in ["", *kept])
        if len(kept) < len(lines):
            self._file.close()
            with atomic_write(self._path, "w") as file:
                file.writelines(kept)
            self._file = _open_for_appending(self._path)

    def write(self) -> None:
        """Append the values that came since the last call."""
        values = get_event_storage().latest_with_smoothing_hint(self._window_size)
        lines: dict[int, dict[str, float | None]] = defaultdict(dict)
        for name, (value, iteration) in values.items():
            if iteration > self._last_write:
                lines[iteration][name] = value if math.isfinite(value) else None
        for iteration in sorted(lines):
            record = {"iteration": iteration, **lines[iteration]}
            self._file.write(json.dumps(record, sort_keys=True, allow_nan=False) + "\n")
        if lines:
            self._last_write = max(lines)
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorboardXWriter(EventWriter):
    """Writes scalars, images and histograms as TensorBoard events.

    Args:
        log_dir: folder of the event files.
        window_size: iterations of the median for scalars with a smoothing hint.
        kwargs: passed to ``torch.utils.tensorboard.SummaryWriter``.
    """

    def __init__(self, log_dir: str, window_size: int = 20, **kwargs: Any) -> None:
        self._log_dir, self._kwargs = log_dir, kwargs
        self._window_size = window_size
        self._writer: Any = None
        self._last_write = -1

    def write(self) -> None:
        """Write the values that came since the last call."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(self._log_dir, **self._kwargs)
        storage = get_event_storage()
        newest = self._last_write
        for name, (value, step) in storage.latest_with_smoothing_hint(self._window_size).items():
            if step > self._last_write:
                self._writer.add_scalar(name, value, step)
                newest = max(newest, step)
        self._last_write = newest
        for name, image, step in storage.images():
            self._writer.add_image(name, image, step)
        storage.clear_images()
        for histogram in storage._histograms:
            self._writer.add_histogram_raw(**histogram)
        storage.clear_histograms()

    def close(self) -> None:
        """Close the event file, if one was opened."""
        if self._writer is not None:
            self._writer.close()


class CommonMetricPrinter(EventWriter):
    """Logs one line with progress, losses, seconds per iteration, learning rate and memory.

    Args:
        max_iter: the last iteration, for the estimated time of arrival; None prints none.
        window_size: iterations over which values are smoothed.
    """

    def __init__(self, max_iter: int | None = None, window_size: int = 20) -> None:
        self.logger = logging.getLogger("d2kit.utils.events")
        self._max_iter = max_iter
        self._window_size = window_size
        self._last_seen: tuple[int, float] | None = None

    def _eta(self, storage: EventStorage) -> str | None:
        """Return the time left as h:mm:ss, from the measured step time or our own clock."""
        if self._max_iter is None:
            return None
        now, last = (storage.iter, time.perf_counter()), self._last_seen
        self._last_seen = now
        if "time" in storage.histories():
            seconds = storage.history("time").global_avg()
            storage.put_scalar(
                "eta_seconds", seconds * (self._max_iter - storage.iter - 1), smoothing_hint=False
            )
        elif last is not None and now[0] > last[0]:
            seconds = (now[1] - last[1]) / (now[0] - last[0])
        else:
            return None
        left = max(self._max_iter - storage.iter - 1, 0) * seconds
        return str(datetime.timedelta(seconds=int(left)))

    def _value(self, storage: EventStorage, name: str) -> float | None:
        if name not in storage.histories():
            return None
        return storage.history(name).avg(storage.count_samples(name, self._window_size))

    def write(self) -> None:
        """Log the line of the current iteration; nothing once `max_iter` is reached."""
        storage = get_event_storage()
        if storage.iter == self._max_iter:
            return
        parts = []
        eta = self._eta(storage)
        if eta is not None:
            parts.append(f"eta: {eta}")
        parts.append(f"iter: {storage.iter}")
        for name, history in storage.histories().items():
            if "loss" in name:
                median = history.median(storage.count_samples(name, self._window_size))
                parts.append(f"{name}: {median:.4g}")
        for name in ("time", "data_time"):
            mean = self._value(storage, name)
            if mean is not None:
                parts.append(f"{name}: {mean:.4f}")
        if "lr" in storage.histories():
            parts.append(f"lr: {storage.history('lr').latest():.5g}")
        if torch.cuda.is_available():
            parts.append(f"max_mem: {torch.cuda.max_memory_allocated() / 2**20:.0f}M")
        self.logger.info("  ".join(parts))
