"""Training metrics: put by anyone into the current `EventStorage`, written by the writers."""

from __future__ import annotations

import datetime
import json
import logging
import math
import os
import re
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from types import TracebackType
from typing import IO, Any

import numpy as np
import torch
from fvcore.common.history_buffer import HistoryBuffer
from torch import Tensor
from typing_extensions import Self

from d2kit.utils.devices import exact_dtype
from d2kit.utils.file_io import PathManager, atomic_write
from d2kit.utils.logger import auxiliary
from d2kit.utils.names import NoStorageError
from d2kit.utils.text import one_line

_STACK: list[EventStorage] = []
_MEASURED = "time|eta|second|memory"  # names of scalars that differ from run to run
_MAX_PENDING = 4096  # device scalars kept before they are fetched although nobody asked


def _on_device(tensor: Tensor) -> bool:
    """Tell whether reading a tensor makes the host wait."""
    return tensor.device.type != "cpu"


def get_event_storage() -> EventStorage:
    """Return the storage of the innermost ``with EventStorage(...)`` block.

    Raises:
        RuntimeError: if there is none.
    """
    if not _STACK:
        raise NoStorageError(
            "get_event_storage() was called outside of a `with EventStorage(start_iter):` block; "
            "open one around the training step"
        )
    return _STACK[-1]


def has_event_storage() -> bool:
    """Tell whether the code runs inside a ``with EventStorage(...)`` block."""
    return bool(_STACK)


class EventStorage:
    """Scalars with their history, and the images and histograms that wait to be written.

    Scalars may be tensors on a device: they are kept there and fetched together when somebody
    reads, so that putting never makes the host wait for the device.

    Args:
        start_iter: the iteration to start from.
    """

    def __init__(self, start_iter: int = 0) -> None:
        self._iter = start_iter
        self._current_prefix = ""
        self._history: dict[str, HistoryBuffer] = defaultdict(HistoryBuffer)
        self._latest_scalars: dict[str, tuple[float, int]] = {}
        self._smoothing_hints: dict[str, bool] = {}
        self._pending: list[tuple[str, Tensor | float, int]] = []
        self._pending_tensors = 0
        self._vis_data: list[tuple[str, Any, int]] = []
        self._histograms: list[dict[str, Any]] = []

    def put_image(self, img_name: str, img_tensor: Tensor | np.ndarray) -> None:
        """Keep an image for the writers that show images.

        Args:
            img_name: its name.
            img_tensor: (3, H, W) RGB, uint8 in [0, 255] or floating point in [0, 1].
        """
        self._vis_data.append((self._current_prefix + img_name, img_tensor, self._iter))

    def put_scalar(
        self,
        name: str,
        value: float | Tensor,
        smoothing_hint: bool = True,
        cur_iter: int | None = None,
    ) -> None:
        """Record one value of a scalar.

        Args:
            name: its name; the current `name_scope` is put before it.
            value: a number or a tensor of one element.
            smoothing_hint: whether writers show a median over a window instead of the last value.
            cur_iter: the iteration it belongs to; None means the current one.

        Raises:
            ValueError: if a tensor has not one element, or the hint is not that of earlier values.
        """
        name = self._current_prefix + name
        if (former := self._smoothing_hints.setdefault(name, smoothing_hint)) != smoothing_hint:
            raise ValueError(
                f"scalar '{name}' was put with smoothing_hint={former} before, now with "
                f"{smoothing_hint}; use one of them everywhere"
            )
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(
                    f"scalar '{name}' needs one element, got shape {tuple(value.shape)}"
                )
            value = value.detach().reshape(())
            value = value.clone() if _on_device(value) else float(value)
        else:
            value = float(value)
        self._pending_tensors += isinstance(value, Tensor)
        self._pending.append((name, value, self._iter if cur_iter is None else cur_iter))
        if self._pending_tensors == 0 or self._pending_tensors > _MAX_PENDING:
            self._fetch()

    def _fetch(self) -> None:
        """Move what was put into the histories; all device values come in one copy per device."""
        by_device: dict[torch.device, list[int]] = defaultdict(list)
        for index, (_, value, _) in enumerate(self._pending):
            if isinstance(value, Tensor):
                by_device[value.device].append(index)
        numbers: dict[int, float] = {}
        for device, indices in by_device.items():
            dtype = exact_dtype(device)
            stacked = torch.stack([torch.as_tensor(self._pending[i][1]).to(dtype) for i in indices])
            numbers.update(zip(indices, stacked.tolist(), strict=True))
        for index, (name, value, iteration) in enumerate(self._pending):
            number = numbers[index] if index in numbers else float(value)
            self._history[name].update(number, iteration)
            self._latest_scalars[name] = (number, iteration)
        self._pending.clear()
        self._pending_tensors = 0

    def state_dict(self, window: int = 20) -> dict[str, Any]:
        """Return what a resumed run must know of the scalars, but for measured times.

        Args:
            window: iterations whose values are kept, of each that is smoothed.

        Returns:
            ``"smoothed"``: name -> the last [value, iteration] pairs; ``"last"``: name -> the last
            pair of each other scalar, which may not have been written yet.
        """
        self._fetch()
        state: dict[str, Any] = {"smoothed": {}, "last": {}}
        for name in sorted(self._history):
            if re.search(_MEASURED, name):
                continue
            smoothed = bool(self._smoothing_hints.get(name))
            count = self.count_samples(name, window) if smoothed else 1
            values = [[float(x), int(i)] for x, i in self._history[name].values()[-count:]]
            if smoothed:
                state["smoothed"][name] = values
            else:
                state["last"][name] = values[0]
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Put back what `state_dict` returned, so that writers go on as if nothing had happened."""
        for name, values in state_dict.get("smoothed", {}).items():
            self._smoothing_hints[name] = True
            for value, iteration in values:
                self._history[name].update(value, iteration)
                # its line may not have been written
                self._latest_scalars[name] = (value, iteration)
        for name, (value, iteration) in state_dict.get("last", {}).items():
            self.put_scalar(name, value, smoothing_hint=False, cur_iter=iteration)

    def put_scalars(
        self, *, smoothing_hint: bool = True, cur_iter: int | None = None, **kwargs: float | Tensor
    ) -> None:
        """Record several scalars given as keyword arguments, see `put_scalar`."""
        for name, value in kwargs.items():
            self.put_scalar(name, value, smoothing_hint=smoothing_hint, cur_iter=cur_iter)

    def put_histogram(self, hist_name: str, hist_tensor: Tensor, bins: int = 1000) -> None:
        """Keep the histogram of a tensor for the writers that show histograms.

        Args:
            hist_name: its name.
            hist_tensor: any shape, at least one element.
            bins: number of equal bins between its minimum and maximum.
        """
        values = hist_tensor.detach().float().cpu()
        low, high = float(values.min()), float(values.max())
        counts = torch.histc(values, bins=bins)
        edges = torch.linspace(low, high, bins + 1)
        self._histograms.append(
            {
                "tag": self._current_prefix + hist_name,
                "min": low,
                "max": high,
                "num": values.numel(),
                "sum": float(values.sum()),
                "sum_squares": float((values**2).sum()),
                "bucket_limits": edges[1:].tolist(),
                "bucket_counts": counts.tolist(),
                "global_step": self._iter,
            }
        )

    def history(self, name: str) -> HistoryBuffer:
        """Return the values of a scalar (`latest`, `median`, `avg`, `global_avg`, `values`).

        Raises:
            KeyError: if nothing was put under that name.
        """
        self._fetch()
        if name not in self._history:
            from d2kit.utils.names import nearest_names

            raise KeyError(
                f"no scalar named '{name}' was put (nearest: {nearest_names(name, self._history)})"
            )
        return self._history[name]

    def histories(self) -> dict[str, HistoryBuffer]:
        """Return name -> history of all scalars."""
        self._fetch()
        return self._history

    def latest(self) -> Mapping[str, tuple[float, int]]:
        """Return name -> (last value, its iteration)."""
        self._fetch()
        return self._latest_scalars

    def latest_with_smoothing_hint(self, window_size: int = 20) -> dict[str, tuple[float, int]]:
        """Return name -> (value, iteration) where hinted scalars are medians.

        Args:
            window_size: iterations that the median covers.
        """
        return {
            name: (
                self._history[name].median(self.count_samples(name, window_size))
                if self._smoothing_hints[name]
                else value,
                iteration,
            )
            for name, (value, iteration) in self.latest().items()
        }

    def count_samples(self, name: str, window_size: int = 20) -> int:
        """Return how many values of a scalar were put within the last `window_size` iterations.

        The window ends at the scalar's newest value, so the result is at least 1.
        """
        values = self.history(name).values()
        newest = values[-1][1]
        count = 0
        for _, iteration in reversed(values):
            if iteration <= newest - window_size:
                break
            count += 1
        return count

    def smoothing_hints(self) -> dict[str, bool]:
        """Return name -> whether writers may smooth it."""
        return self._smoothing_hints

    def step(self) -> None:
        """Go to the next iteration; call it once after each training step's values were written."""
        self._iter += 1

    @property
    def iter(self) -> int:
        """The current iteration; when used with a trainer, its `iter`."""
        return self._iter

    @iter.setter
    def iter(self, value: int) -> None:
        self._iter = int(value)

    @property
    def iteration(self) -> int:
        """The same as `iter`."""
        return self._iter

    @contextmanager
    def name_scope(self, name: str) -> Iterator[None]:
        """Put ``name/`` before the names of everything that is put in the block."""
        former = self._current_prefix
        self._current_prefix = name.rstrip("/") + "/"
        try:
            yield
        finally:
            self._current_prefix = former

    def images(self) -> list[tuple[str, Any, int]]:
        """Return the images that wait: name, as it was put, iteration."""
        return list(self._vis_data)

    def clear_images(self) -> None:
        """Forget the images, usually after they were written."""
        self._vis_data.clear()

    def clear_histograms(self) -> None:
        """Forget the histograms, usually after they were written."""
        self._histograms.clear()

    def __enter__(self) -> Self:
        _STACK.append(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _STACK.pop()


logger = logging.getLogger(__name__)
LONGEST = 1 << 20  # bytes of a line


class EventWriter(ABC):
    """Something that writes the values of the current `EventStorage` when `write` is called."""

    @abstractmethod
    def write(self) -> None:
        """Write what is new."""

    def continue_from(self, iteration: int) -> None:  # noqa: B027 not every medium can forget
        """Forget what was written of `iteration` and later, which will come again."""

    def close(self) -> None:  # noqa: B027 a writer without files has nothing to do
        """Release files; nothing by default."""


def _append(path: str, lines: bytes) -> None:
    """Append whole lines to a local file, or nothing of them.

    An unfinished last line, of a killed process, is cut off.

    Raises:
        OSError: if the system does not take all of it.
    """
    with open(path, "ab+", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        start = max(end - LONGEST, 0)
        file.seek(start)
        tail = file.read(LONGEST) if end else b""
        if tail and not tail.endswith(b"\n"):
            end = start + tail.rfind(b"\n") + 1
            file.truncate(end)
        try:
            rest = memoryview(lines)
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            with suppress(OSError):
                file.truncate(end)
            raise


def _iteration_of(line: bytes) -> int | None:
    """Return the iteration of a line of ``metrics.json``, -1 without one; None: it is no JSON."""
    try:
        found = json.loads(line).get("iteration", -1)
    except (ValueError, AttributeError, RecursionError):
        return None
    return found if type(found) is int else -1


class JSONWriter(EventWriter):
    """Appends one JSON object per line: ``{"iteration": 19, "total_loss": 1.2, ...}``.

    A value stands in the line of the iteration that it was put at, whenever `write` is called.
    NaN and infinity, which JSON does not know, are written as null. Lines that the disk does not
    take wait, after one warning, and are written when it has room again.

    Args:
        json_file: path of the file; an existing one is continued.
        window_size: iterations of the median for scalars with a smoothing hint.
    """

    def __init__(self, json_file: str, window_size: int = 20) -> None:
        self._path = str(json_file)
        self._window_size = window_size
        self._last_write = -1
        self._waiting: list[bytes] = []

    @cached_property
    def _file_handle(self) -> IO[str]:
        """The file at its end, for writers of one's own that add lines."""
        found: IO[str] = PathManager.open(self._path, "a")
        return found

    def continue_from(self, iteration: int) -> None:
        """Remove the lines of `iteration` and later, where a killed run was ahead of its resume."""
        if not os.path.isfile(self._path):
            return
        with open(self._path, "rb") as file:
            lines = file.readlines()
        numbers = [_iteration_of(line) for line in lines]
        places = [i for i, n in enumerate(numbers) if n is not None and n < iteration]
        garbage = [i + 1 for i, n in enumerate(numbers) if n is None and lines[i].endswith(b"\n")]
        if garbage:
            logger.warning(
                "%s: left out %d lines that are no JSON, the first is line %d: %s",
                self._path,
                len(garbage),
                garbage[0],
                one_line(lines[garbage[0] - 1].decode(errors="replace").strip(), 80),
            )
        self._last_write = max([-1, *(numbers[i] or 0 for i in places)])
        kept = [lines[i] for i in places]
        if kept and not kept[-1].endswith(b"\n"):  # killed before the last byte of a whole line
            kept[-1] += b"\n"
        if kept != lines:
            with atomic_write(self._path) as file:
                file.writelines(kept)

    def write(self) -> None:
        """Append the values that came since the last call."""
        values = get_event_storage().latest_with_smoothing_hint(self._window_size)
        lines: dict[int, dict[str, float | None]] = defaultdict(dict)
        for name, (value, iteration) in values.items():
            if iteration > self._last_write:
                lines[iteration][name] = value if math.isfinite(value) else None
        for iteration in sorted(lines):
            record = {"iteration": iteration, **lines[iteration]}
            text = json.dumps(record, sort_keys=True, allow_nan=False) + "\n"
            self._waiting.append(text.encode())
        if lines:
            self._last_write = max(lines)
        self._flush()

    def _flush(self) -> None:
        """Append what waits; it goes on waiting where that fails."""
        if not self._waiting:
            return
        with auxiliary(self._path):
            if "://" in self._path:  # a medium of a path handler
                with PathManager.open(self._path, "ab") as file:
                    file.write(b"".join(self._waiting))
            else:
                _append(self._path, b"".join(self._waiting))
            self._waiting.clear()

    def close(self) -> None:
        """Write what still waits."""
        self._flush()


class TensorboardXWriter(EventWriter):
    """Writes scalars, images and histograms as TensorBoard events.

    Args:
        log_dir: folder of the event files.
        window_size: iterations of the median for scalars with a smoothing hint.
        kwargs: passed to ``torch.utils.tensorboard.SummaryWriter``.
    """

    def __init__(self, log_dir: str, window_size: int = 20, **kwargs: object) -> None:
        self._log_dir, self._kwargs = log_dir, kwargs
        self._window_size = window_size
        self._last_write = -1

    @cached_property
    def _writer(self) -> Any:
        """The writer of the event file, which is opened when it is first asked for."""
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(self._log_dir, **self._kwargs)

    def write(self) -> None:
        """Write the values that came since the last call."""
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
        if "_writer" in self.__dict__:
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

    def _get_eta(self, storage: EventStorage) -> str | None:
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
        found: float | None = storage.history(name).avg(
            storage.count_samples(name, self._window_size)
        )
        return found

    def write(self) -> None:
        """Log the line of the current iteration; nothing once `max_iter` is reached."""
        storage = get_event_storage()
        if storage.iter == self._max_iter:
            return
        parts = []
        eta = self._get_eta(storage)
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
                parts.append(f"last_{name}: {storage.history(name).latest():.4f}")
        if "lr" in storage.histories():
            parts.append(f"lr: {storage.history('lr').latest():.5g}")
        if torch.cuda.is_initialized():
            parts.append(f"max_mem: {torch.cuda.max_memory_allocated() / 2**20:.0f}M")
        self.logger.info("  ".join(parts))


def put_scalars(prefix: str, **values: Tensor | float) -> None:
    """Publish `values` as ``prefix/name``, without waiting for the device.

    Args:
        prefix: the first part of each name, for example ``"rpn"``; empty for none.
        **values: numbers or 0-dim tensors; tensors stay where they are until they are written.
    """
    if not has_event_storage():
        return
    storage = get_event_storage()
    for name, value in values.items():
        storage.put_scalar(f"{prefix}/{name}" if prefix else name, value)


def picture_due(period: int) -> bool:
    """Tell whether this step publishes pictures: every `period` steps, 0 for never."""
    return period > 0 and has_event_storage() and get_event_storage().iter % period == 0


def put_image(name: str, image: Tensor) -> None:
    """Publish an RGB `image` (3, H, W), uint8 or float in 0..1, under `name`."""
    if has_event_storage():
        get_event_storage().put_image(name, image)
