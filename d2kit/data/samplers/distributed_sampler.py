"""Samplers: the order of records, their split over processes, batches of one group."""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data.sampler import BatchSampler, Sampler

from d2kit.data.common import batches_by_group
from d2kit.utils import comm

__all__ = [
    "GroupedBatchSampler",
    "InferenceSampler",
    "RandomSubsetTrainingSampler",
    "RepeatFactorTrainingSampler",
    "TrainingSampler",
]


class _EpochSampler(Sampler[int]):
    """An infinite sampler made of epochs."""

    def __init__(self) -> None:
        self._rank = comm.get_rank()
        self._world_size = comm.get_world_size()

    @abstractmethod
    def epochs(self) -> Iterator[np.ndarray]:
        """Yield the indices of each epoch, without end.

        Returns:
            Iterator of int64 arrays, none of them empty.
        """

    def stream(self, start: int = 0) -> Iterator[int]:
        """Yield the global stream of indices, the same on every process.

        Args:
            start: position of the first index; the epochs before it are drawn but not walked.

        Returns:
            Infinite iterator of record indices.

        Raises:
            ValueError: `start` is negative.
        """
        if start < 0:
            raise ValueError(f"stream expects a start >= 0, got {start}")
        if type(self)._infinite_indices is not _EpochSampler._infinite_indices:
            return itertools.islice(self._infinite_indices(), start, None)
        return self._stream(start)

    def _stream(self, start: int) -> Iterator[int]:
        for epoch in self.epochs():
            if start < len(epoch):
                yield from epoch[start:].tolist()
            start = max(start - len(epoch), 0)

    def _infinite_indices(self) -> Iterator[int]:
        """Yield the global stream from its start; user classes override it."""
        return self._stream(0)

    def __iter__(self) -> Iterator[int]:
        """Yield this process's share: every `world_size`-th index of the global stream."""
        yield from itertools.islice(self.stream(), self._rank, None, self._world_size)


def _check_size(size: object, who: str) -> int:
    if not isinstance(size, int) or size <= 0:
        raise ValueError(f"{who} expects a number of records > 0, got {size!r}; is the data empty?")
    return size


def _seed_or_shared(seed: int | None) -> int:
    return comm.shared_random_seed() if seed is None else int(seed)


class TrainingSampler(_EpochSampler):
    """Random permutations of all records, one after the other, without end.

    Args:
        size: number of records.
        shuffle: False repeats 0, 1, ..., size - 1.
        seed: of the permutations, equal on all processes; None draws one that they share.

    Raises:
        ValueError: `size` is not a positive integer.
    """

    def __init__(self, size: int, shuffle: bool = True, seed: int | None = None) -> None:
        super().__init__()
        self._size = _check_size(size, "TrainingSampler")
        self._records = np.arange(self._size)
        self._shuffle = shuffle
        self._seed = _seed_or_shared(seed)

    def epochs(self) -> Iterator[np.ndarray]:
        """Yield one permutation per epoch, successive draws of one generator."""
        generator = torch.Generator()
        generator.manual_seed(self._seed)
        while True:
            if self._shuffle:
                yield self._records[torch.randperm(len(self._records), generator=generator).numpy()]
            else:
                yield self._records


class RandomSubsetTrainingSampler(TrainingSampler):
    """Like `TrainingSampler`, on a random part of the records that is chosen once.

    Args:
        size: number of records.
        subset_ratio: part that is used, in (0, 1].
        shuffle: False keeps the order in which the part was drawn.
        seed_shuffle: seed of the order.
        seed_subset: seed of the choice.

    Raises:
        ValueError: the ratio is outside (0, 1] or leaves no record.
    """

    def __init__(
        self,
        size: int,
        subset_ratio: float,
        shuffle: bool = True,
        seed_shuffle: int | None = None,
        seed_subset: int | None = None,
    ) -> None:
        super().__init__(size, shuffle=shuffle, seed=seed_shuffle)
        count = int(size * subset_ratio) if 0.0 < subset_ratio <= 1.0 else 0
        if count == 0:
            raise ValueError(
                f"RandomSubsetTrainingSampler expects a subset_ratio in (0, 1] that leaves "
                f"a record, got {subset_ratio} of {size} records"
            )
        generator = torch.Generator()
        generator.manual_seed(_seed_or_shared(seed_subset))
        self._records = torch.randperm(size, generator=generator)[:count].numpy()


class RepeatFactorTrainingSampler(_EpochSampler):
    """Repeats each record by its own factor; fractions are rounded at random in each epoch.

    Args:
        repeat_factors: (N,) floats >= 0, how often each record is used per epoch on average.
        shuffle: False keeps the repeats of a record together.
        seed: of rounding and order, equal on all processes; None draws one that they share.

    Raises:
        ValueError: a factor is negative or not finite, or all are 0.

    Source:
        Gupta, Dollar, Girshick: LVIS, CVPR 2019, section 5.3.
    """

    def __init__(
        self,
        repeat_factors: torch.Tensor | Sequence[float],
        *,
        shuffle: bool = True,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self._shuffle = shuffle
        self._seed = _seed_or_shared(seed)
        factors = torch.as_tensor(repeat_factors, dtype=torch.float32)
        if factors.ndim != 1 or not bool(torch.isfinite(factors).all() and (factors >= 0).all()):
            raise ValueError("repeat_factors must be one list of finite numbers >= 0")
        if not bool((factors > 0).any()):
            raise ValueError("repeat_factors must hold a number > 0; is the dataset empty?")
        self._int_part = torch.trunc(factors)
        self._frac_part = factors - self._int_part

    @staticmethod
    def repeat_factors_from_category_frequency(
        dataset_dicts: Sequence[dict[str, Any]], repeat_thresh: float, sqrt: bool = True
    ) -> torch.Tensor:
        """Compute factors that oversample images of rare categories.

        With f(c) the part of images that hold category c, the factor of an image is the largest
        max(1, sqrt(repeat_thresh / f(c))) over its categories, and 1 where it has none.

        Args:
            dataset_dicts: records in the standard format.
            repeat_thresh: part of images in (0, 1) below which a category is oversampled.
            sqrt: False drops the square root.

        Returns:
            (N,) float32 factors >= 1.
        """
        held = [{a["category_id"] for a in d.get("annotations", ())} for d in dataset_dicts]
        images_of = Counter(category for categories in held for category in categories)
        factor = {}
        for category, count in images_of.items():
            ratio = repeat_thresh / (count / len(held))
            factor[category] = max(1.0, math.sqrt(ratio) if sqrt else ratio)
        best = [max((factor[c] for c in categories), default=1.0) for categories in held]
        return torch.tensor(best, dtype=torch.float32)

    def epochs(self) -> Iterator[np.ndarray]:
        """Yield the repeated, shuffled records of each epoch."""
        generator = torch.Generator()
        generator.manual_seed(self._seed)
        while True:
            epoch = self._get_epoch_indices(generator)
            if self._shuffle:
                epoch = epoch[torch.randperm(len(epoch), generator=generator)]
            if len(epoch):
                yield epoch.numpy()

    def _get_epoch_indices(self, generator: torch.Generator) -> torch.Tensor:
        """Return int64 (R,): each record as often as this epoch has it, in order."""
        extra = torch.rand(len(self._int_part), generator=generator) < self._frac_part
        records = torch.arange(len(self._int_part))
        return records.repeat_interleave((self._int_part + extra).long())


class InferenceSampler(Sampler[int]):
    """Splits the records into one contiguous part per process; sizes differ by one at most.

    Args:
        size: number of records, > 0.

    Raises:
        ValueError: `size` is not a positive integer.
    """

    def __init__(self, size: int) -> None:
        self._size = _check_size(size, "InferenceSampler")
        self._local_indices = self._get_local_indices(size, comm.get_world_size(), comm.get_rank())

    @staticmethod
    def _get_local_indices(total_size: int, world_size: int, rank: int) -> range:
        """Return the records of process `rank`: the first processes take one more."""
        share, left = divmod(total_size, world_size)
        begin = rank * share + min(rank, left)
        return range(begin, begin + share + (rank < left))

    def __iter__(self) -> Iterator[int]:
        yield from self._local_indices

    def __len__(self) -> int:
        return len(self._local_indices)


class GroupedBatchSampler(BatchSampler):
    """Forms batches within groups, in the order in which they become full.

    Args:
        sampler: yields record indices.
        group_ids: group of each record, `group_ids[index]`.
        batch_size: indices per batch. A group that never fills a batch is not yielded.

    Raises:
        ValueError: `sampler` is not a Sampler, or the batch size is not positive.
    """

    def __init__(self, sampler: Sampler[int], group_ids: Sequence[int], batch_size: int) -> None:
        if not isinstance(sampler, Sampler):
            raise ValueError(
                "GroupedBatchSampler expects a torch.utils.data.Sampler, got "
                f"{type(sampler).__name__}"
            )
        if batch_size < 1:
            raise ValueError(f"GroupedBatchSampler expects batch_size >= 1, got {batch_size}")
        self.sampler = sampler
        self.group_ids = [int(g) for g in group_ids]
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[list[int]]:
        return batches_by_group(self.sampler, self.group_ids.__getitem__, self.batch_size)

    def __len__(self) -> int:
        raise NotImplementedError(
            "the number of batches depends on the order of the groups and is not known beforehand"
        )
