"""The global list of training batches: record indices with their positions in the sample stream.

Every process computes the same list and takes its slice of each batch, so that order and grouping
do not depend on the number of processes, and no image is opened to find the place of a batch.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data.sampler import Sampler

_Item = TypeVar("_Item")

CHUNK = 4096
"""Indices handled at once: small epochs are joined, which keeps a jump over many of them fast."""

Pair = tuple[int, int]


def has_global_stream(sampler: Any) -> bool:
    """Whether `sampler.stream` gives its order.

    A class of the user that inherits `stream` but has an `__iter__` of its own orders the records
    by the latter.
    """
    for cls in type(sampler).__mro__:
        if "stream" in vars(cls) or "epochs" in vars(cls):
            return callable(getattr(sampler, "stream", None))
        if "__iter__" in vars(cls) or "_infinite_indices" in vars(cls):
            return False
    return False


def index_chunks(sampler: Any, read_ahead: int) -> Iterator[np.ndarray]:
    """Yield the order of `sampler` in arrays.

    Args:
        sampler: with a global `stream`, or any iterable of indices.
        read_ahead: how many indices to take at once from a sampler of the user, which may be slow
            or keep a state.

    Returns:
        Iterator of int64 arrays, none of them empty; infinite where the sampler is.
    """
    if has_global_stream(sampler) and hasattr(sampler, "epochs"):
        parts: list[np.ndarray] = []
        size = 0
        for epoch in sampler.epochs():
            parts.append(epoch)
            size += len(epoch)
            if size >= CHUNK:
                yield np.concatenate(parts)
                parts, size = [], 0
        if parts:  # a sampler of the user may end
            yield np.concatenate(parts)
        return
    indices = iter(sampler.stream() if has_global_stream(sampler) else sampler)
    while True:
        chunk = np.fromiter(itertools.islice(indices, read_ahead), dtype=np.int64)
        if len(chunk) == 0:
            return
        yield chunk


def batches_by_group(
    items: Iterable[_Item], group_of: Callable[[_Item], Hashable], size: int
) -> Iterator[list[_Item]]:
    """Yield lists of `size` items of one group each, in the order in which they become full.

    Args:
        items: what is batched; items of a group that never fills a batch are not yielded.
        group_of: item -> its group.
        size: items per batch, at least 1.
    """
    unfinished: dict[Hashable, list[_Item]] = {}
    for item in items:
        group = group_of(item)
        batch = [*unfinished.pop(group, ()), item]
        if len(batch) == size:
            yield batch
        else:
            unfinished[group] = batch


class GlobalBatches(Sampler[list[Pair]]):
    """Batch sampler that yields this process's slice of each global batch.

    Args:
        chunks: starts the stream of indices, see `index_chunks`.
        batch_size: samples of a global batch.
        groups: (N,) uint8 group of each record, 0 or 1; a batch holds one group and is emitted
            when it is full. None: no groups.
        rank: this process, in [0, world_size).
        world_size: number of processes; divides `batch_size`.
        start: number of global batches to skip.
        position_step: distance of successive positions, and
        position_offset: first position: for a stream that is only one process's share.
        drop_last: leave out batches that are not full when a finite stream ends.
        count: returns the number of indices of one pass; None: it has none.
    """

    def __init__(
        self,
        chunks: Callable[[], Iterator[np.ndarray]],
        batch_size: int,
        groups: np.ndarray | None = None,
        *,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        position_step: int = 1,
        position_offset: int = 0,
        drop_last: bool = True,
        count: Callable[[], int | None] | None = None,
    ) -> None:
        self.chunks = chunks
        self.count = count
        self.batch_size = batch_size
        self.groups = groups
        self.rank = rank
        self.world_size = world_size
        self.start = start
        self.position_step = position_step
        self.position_offset = position_offset
        self.drop_last = drop_last

    def __len__(self) -> int:
        """Return the number of batches of one pass, where the sampler of indices has a length."""
        count = self.count() if self.count is not None else None
        if count is None:
            raise TypeError("the stream of indices has no end, so that its batches have no number")
        size = self.batch_size
        return max((count // size if self.drop_last else -(-count // size)) - self.start, 0)

    def __iter__(self) -> Iterator[list[Pair]]:
        share = self.batch_size // self.world_size
        mine = slice(self.rank * share, (self.rank + 1) * share)
        skip = self.start
        for indices, positions in self._blocks():
            for i in range(skip, len(indices)):
                batch = list(
                    zip(indices[i][mine].tolist(), positions[i][mine].tolist(), strict=True)
                )
                if batch:
                    yield batch
            skip = max(skip - len(indices), 0)

    def _blocks(self) -> Iterator[tuple[Any, Any]]:
        """Yield global batches as pairs of (B, batch_size) arrays: indices and positions."""
        empty = np.empty((2, 0), dtype=np.int64)
        waiting = [empty, empty] if self.groups is not None else [empty]
        position = 0
        for chunk in self.chunks():
            samples = np.stack([chunk, np.arange(position, position + len(chunk))])
            position += len(chunk)
            full = []
            for group in range(len(waiting)):
                chosen = samples
                if self.groups is not None:
                    chosen = samples[:, self.groups[chunk] == group]
                queue = np.concatenate([waiting[group], chosen], axis=1)
                end = queue.shape[1] // self.batch_size * self.batch_size
                full.append(queue[:, :end].reshape(2, -1, self.batch_size))
                waiting[group] = queue[:, end:]
            batches = np.concatenate(full, axis=1)
            # A batch is emitted when its last sample arrives.
            batches = batches[:, np.argsort(batches[1, :, -1])]
            yield batches[0], self._as_global(batches[1])
        if not self.drop_last:
            for rest in waiting:
                yield rest[:1], self._as_global(rest[1:])

    def _as_global(self, positions: np.ndarray) -> np.ndarray:
        return positions * self.position_step + self.position_offset


logger = logging.getLogger(__name__)


class SampleError(RuntimeError, ValueError):
    """The image or the annotations of a record are damaged: one line that names the image.

    A `ValueError`, because the data are the user's; scripts print it without a traceback.
    """


class SkippedRecords:
    """Remembers which records were damaged, over all workers of a loader.

    Args:
        count: number of records of the dataset.
        limit: how many of them may be damaged, at least 0.

    Raises:
        ValueError: if `limit` is negative.
    """

    def __init__(self, count: int, limit: int) -> None:
        if limit < 0:
            raise ValueError(f"DATALOADER.MAX_SKIPPED_IMAGES must be >= 0, got {limit}")
        self.limit = limit
        # Shared with the workers. A mark per record needs no lock: it is only ever set.
        self._marks = torch.zeros(count, dtype=torch.uint8).share_memory_()

    def add(self, index: int, error: SampleError) -> None:
        """Count a record, and say so once.

        Args:
            index: of the record.
            error: what is wrong with it.

        Raises:
            SampleError: more than `limit` records are damaged.
        """
        if self._marks[index]:
            return
        self._marks[index] = 1
        number = int(self._marks.sum())
        if number > self.limit:
            raise SampleError(
                f"{error}; it is damaged image number {number} of this process, and "
                f"DATALOADER.MAX_SKIPPED_IMAGES allows {self.limit}"
            ) from error
        logger.warning("Skipped image %d of at most %d: %s", number, self.limit, error)

    def indices(self) -> list[int]:
        """Return the records counted so far, in the order of the dataset."""
        return self._marks.nonzero()[:, 0].tolist()
