"""How fast each stage of loading is: records, mapper, workers, their transfer, all processes."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from d2kit.data.build import build_batch_data_loader
from d2kit.data.common import DatasetFromList, MapDataset
from d2kit.data.samplers import TrainingSampler
from d2kit.utils import comm

__all__ = ["DataLoaderBenchmark"]

logger = logging.getLogger(__name__)


class _Repeated:
    """A dataset whose every sample is one of a few ready ones."""

    def __init__(self, samples: list[Any], length: int) -> None:
        self.samples = samples
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> object:
        return self.samples[index % len(self.samples)]


class DataLoaderBenchmark:
    """Measures seconds per step of a training loader, stage by stage.

    Args:
        dataset: list of records, or a map-style dataset of them.
        mapper: record -> sample.
        sampler: of indices; None: `TrainingSampler`.
        total_batch_size: samples over all processes.
        num_workers: worker processes of each process.
        max_time_seconds: each measurement ends after this time, or its number of steps.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        mapper: Callable[[Any], Any],
        sampler: Any = None,
        total_batch_size: int,
        num_workers: int = 0,
        max_time_seconds: float = 90,
    ) -> None:
        if isinstance(dataset, (list, tuple)):
            dataset = DatasetFromList(dataset, copy=False)
        self.dataset = dataset
        self.mapper = mapper
        self.sampler = TrainingSampler(len(dataset)) if sampler is None else sampler
        self.total_batch_size = total_batch_size
        self.num_workers = num_workers
        self.per_gpu_batch_size = max(1, total_batch_size // comm.get_world_size())
        self.max_time_seconds = max_time_seconds

    def _records(self) -> Iterator[Any]:
        for index in self.sampler:
            yield self.dataset[index]

    def _measure(self, name: str, steps: Iterable[Any], num_iter: int, warmup: int) -> float:
        """Return the mean seconds per step, after some that are not counted; log them."""
        iterator = iter(steps)
        for _ in itertools.islice(iterator, warmup):
            pass
        seconds: list[float] = []
        start = last = time.perf_counter()
        for _ in itertools.islice(iterator, num_iter):
            now = time.perf_counter()
            seconds.append(now - last)
            last = now
            if now - start > self.max_time_seconds:
                break
        if not seconds:
            raise ValueError(f"{name}: the dataset ended within the {warmup} steps of warm-up")
        mean = float(np.mean(seconds))
        logger.info(
            "%s: %.3g s per step (%.1f per second), slowest %.3g s, %d steps",
            name,
            mean,
            1 / max(mean, 1e-9),
            max(seconds),
            len(seconds),
        )
        return mean

    def _loader(self, dataset: object, num_workers: int) -> Iterable[Any]:
        return build_batch_data_loader(
            dataset, self.sampler, self.total_batch_size, num_workers=num_workers
        )

    def benchmark_dataset(self, num_iter: int, warmup: int = 5) -> float:
        """Measure how long it takes to get one record, in seconds."""
        return self._measure("dataset", self._records(), num_iter, warmup)

    def benchmark_mapper(self, num_iter: int, warmup: int = 5) -> float:
        """Measure how long one record and its mapping take in this process, in seconds."""
        samples = map(self.mapper, self._records())
        return self._measure("mapper, one process", samples, num_iter, warmup)

    def benchmark_workers(self, num_iter: int, warmup: int = 10) -> dict[int, float]:
        """Measure batches with `num_workers` workers, and with one.

        Returns:
            Seconds per batch, by number of workers.
        """
        mapped = MapDataset(self.dataset, self.mapper)
        return {
            workers: self._measure(
                f"{workers} workers, batches of {self.per_gpu_batch_size}",
                self._loader(mapped, workers),
                num_iter,
                warmup,
            )
            for workers in dict.fromkeys((self.num_workers, min(self.num_workers, 1)))
        }

    def benchmark_IPC(self, num_iter: int, warmup: int = 10) -> float:  # noqa: N802
        """Measure the transfer of ready batches from the workers alone, in seconds per batch."""
        ready = [self.mapper(r) for r in itertools.islice(self._records(), self.per_gpu_batch_size)]
        loader = self._loader(_Repeated(ready, len(self.dataset)), self.num_workers)
        return self._measure("transfer from the workers", loader, num_iter, warmup)

    def benchmark_distributed(self, num_iter: int, warmup: int = 10) -> float:
        """Measure the loader on all processes at once; call it on each of them.

        Returns:
            Seconds per batch of the slowest process, which the others wait for in training.
        """
        mapped = MapDataset(self.dataset, self.mapper)
        own = self._measure(
            "this process", self._loader(mapped, self.num_workers), num_iter, warmup
        )
        seconds = comm.all_gather(own)
        logger.info(
            "%d processes: %.3g to %.3g s per batch", len(seconds), min(seconds), max(seconds)
        )
        return float(max(seconds))
