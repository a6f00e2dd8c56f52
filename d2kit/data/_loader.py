"""The training loader: seeded samples in global batches, from any batch on."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils import data as torchdata

from d2kit.data._batches import GlobalBatches
from d2kit.data.common import AspectRatioGroupedDataset, MapDataset, describe_record
from d2kit.utils.env import derive_seed, rng_scope, seed_all_rng

__all__ = ["GroupedSamples", "IterableLoader", "SeededDataset", "TrainLoader", "WorkerSeed"]

SAMPLE_SEED_SALT = 1
"""Keeps the seed that travels with a sample apart from the one its mapper ran under."""


class SeededDataset(torchdata.Dataset[Any]):
    """Makes each sample a function of (seed, position).

    Args:
        dataset: map-style; may draw from `random`, `numpy.random` and torch's CPU generator.
        seed: of the run.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: tuple[int, int]) -> Any:
        """Return the sample for (index, position), with `sample_seed` where it is a dictionary."""
        index, position = place
        with rng_scope(self.seed, position):
            sample = self.dataset[index]
        if isinstance(sample, dict):
            seed = derive_seed(self.seed, position, SAMPLE_SEED_SALT)
            sample = {**sample, "sample_seed": seed}
        return sample

    def name_of(self, index: int) -> str:
        """Say which image record `index` is about."""
        record = self.dataset.record(index) if isinstance(self.dataset, MapDataset) else None
        return f"record {index}, {describe_record(record)}"


class WorkerSeed:
    """Seeds a loader worker by (seed, rank, worker), for iterable datasets.

    Args:
        seed: of the run.
        rank: of this process.
    """

    def __init__(self, seed: int, rank: int) -> None:
        self.seed = seed
        self.rank = rank

    def __call__(self, worker_id: int) -> None:
        seed_all_rng(derive_seed(self.seed, self.rank, worker_id))


class TrainLoader(torchdata.DataLoader[Any]):
    """A `DataLoader` over global batches, which can start at any of them.

    Args:
        samples: seeded samples.
        batches: this process's slices of the global batches.
        collate_fn: list of samples -> batch.
        seed: of the run; keeps the loader from drawing from torch's global generator.
        kwargs: `num_workers`, `prefetch_factor`, ... of `torch.utils.data.DataLoader`.
    """

    def __init__(
        self,
        samples: SeededDataset,
        batches: GlobalBatches,
        *,
        collate_fn: Callable[[list[Any]], Any],
        seed: int,
        **kwargs: Any,
    ) -> None:
        generator = torch.Generator()
        generator.manual_seed(seed)
        super().__init__(
            samples, batch_sampler=batches, collate_fn=collate_fn, generator=generator, **kwargs
        )
        self.samples = samples
        self.batches = batches

    @property
    def start_batch(self) -> int:
        """Number of the global batch with which the next iteration begins; may be set."""
        return self.batches.start

    @start_batch.setter
    def start_batch(self, number: int) -> None:
        if number < 0:
            raise ValueError(f"start_batch must be >= 0, got {number}")
        self.batches.start = number

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield batches, `start_batch` first."""
        batches = super().__iter__()
        in_work = self.batches.handed_out
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if "DataLoader worker" in str(error) and "Caught" not in str(error):
                    raise RuntimeError(self._obituary(error)) from error
                raise
            if in_work:
                in_work.popleft()
            yield batch

    def _obituary(self, error: RuntimeError) -> str:
        """Say on which images the workers were when one of them died."""
        places = itertools.chain.from_iterable(
            itertools.islice(self.batches.handed_out, max(self.num_workers, 1))
        )
        names = "; ".join(self.samples.name_of(index) for index, _ in itertools.islice(places, 32))
        return f"{error} (a data worker died; the memory may be full). In work were: {names}"


class _OnlyFromTheStart:
    """The attribute `start_batch` of a loader that cannot skip: 0, and an error for another."""

    def __get__(self, loader: object, owner: type) -> int:
        return 0

    def __set__(self, loader: object, number: int) -> None:
        if number:
            raise ValueError(
                f"start_batch={number} cannot be reached without decoding: the dataset is "
                "iterable, or its records have no width and height to group by. Give a list of "
                "records, or set DATALOADER.ASPECT_RATIO_GROUPING False"
            )


class IterableLoader(torchdata.DataLoader[Any]):
    """Loader of an iterable dataset, which begins where the dataset begins."""

    start_batch = _OnlyFromTheStart()


class GroupedSamples:
    """Batches of equal aspect group from a loader that yields samples.

    Serves datasets that do not know the sizes of their images beforehand.

    Args:
        loader: yields dictionaries with `width` and `height`, one at a time.
        batch_size: samples per batch.
        collate_fn: list of samples -> batch.
    """

    start_batch = _OnlyFromTheStart()

    def __init__(
        self,
        loader: torchdata.DataLoader[Any],
        batch_size: int,
        collate_fn: Callable[[list[Any]], Any],
    ) -> None:
        self.loader = loader
        self.dataset = loader.dataset
        self.batch_size = batch_size
        self.collate_fn = collate_fn

    def __iter__(self) -> Iterator[Any]:
        for batch in AspectRatioGroupedDataset(self.loader, self.batch_size):
            yield self.collate_fn(batch)
