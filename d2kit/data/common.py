"""Datasets made of lists, mapped datasets, and grouping by aspect ratio.

`DatasetFromList` and `MapDataset` form what a loader reads: records in one block of memory that
worker processes share, and the mapper that turns a record into model input.
"""

from __future__ import annotations

import copy
import itertools
import logging
import pickle
import random
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils import data as torchdata
from torch.utils.data.sampler import Sampler

from d2kit.utils.env import derive_seed
from d2kit.utils.text import text_of

__all__ = [
    "AspectRatioGroupedDataset",
    "DatasetFromList",
    "MapDataset",
    "SerializedList",
    "ToIterableDataset",
    "set_default_dataset_from_list_serialize_method",
]


_Item = TypeVar("_Item")

CHUNK = 4096
"""Indices handled at once: small epochs are joined, which keeps a jump over many of them fast."""

Pair = tuple[int, int]


def has_global_stream(sampler: object) -> bool:
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
        found: list[int] = self._marks.nonzero()[:, 0].tolist()
        return found


MAX_RETRIES = 100
"""How many replacements `MapDataset` tries for a record that maps to None."""


class SerializedList:
    """A read-only list kept as one array of bytes.

    Python objects are written to when they are only read (reference counts), so that every worker
    process would end with its own copy of a list of records; one array stays shared. It is
    pickled by us and unpickled here: no file is involved.

    Args:
        items: picklable objects.
    """

    def __init__(self, items: Sequence[Any]) -> None:
        block, ends = bytearray(), np.zeros(len(items) + 1, dtype=np.int64)
        for i, item in enumerate(items):
            block += pickle.dumps(item, protocol=-1)
            ends[i + 1] = len(block)
        self._bytes = np.frombuffer(block, dtype=np.uint8) if block else np.empty(0, np.uint8)
        self._ends = ends

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Any:
        return pickle.loads(self._bytes.data[self._ends[index] : self._ends[index + 1]])


_default_serialize: Callable[[Sequence[Any]], Any] = SerializedList


@contextmanager
def set_default_dataset_from_list_serialize_method(
    func: Callable[[Sequence[Any]], Any],
) -> Iterator[None]:
    """Use another way to hold the records of every `DatasetFromList` made within the block.

    Args:
        func: takes the list; returns an object with `__len__` and `__getitem__`.
    """
    global _default_serialize  # noqa: PLW0603 (the documented effect)
    before, _default_serialize = _default_serialize, func
    try:
        yield
    finally:
        _default_serialize = before


class DatasetFromList(torchdata.Dataset[Any]):
    """A map-style dataset over a list of records.

    Args:
        lst: the records.
        copy: return deep copies, so that a mapper may change what it gets. Serialised records are
            new objects in any case.
        serialize: hold the records as bytes in shared memory; a function says how.
    """

    def __init__(
        self,
        lst: Sequence[Any],
        copy: bool = True,
        serialize: bool | Callable[[Sequence[Any]], Any] = True,
    ) -> None:
        if not isinstance(lst, (list, tuple)):
            raise ValueError(f"DatasetFromList expects a list, got {type(lst).__name__}")
        self._copy = copy
        self._serialized = bool(serialize)
        self._groups = _aspect_groups(lst)
        if self._serialized:
            self._items = (serialize if callable(serialize) else _default_serialize)(lst)
        else:
            self._items = lst

    @property
    def aspect_groups(self) -> np.ndarray | None:
        """(N,) uint8, 1 where the image is wider than high; None where records lack their size."""
        return self._groups

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, idx: int) -> Any:
        size = len(self._items)
        if not -size <= idx < size:
            raise IndexError(f"record {idx} of a dataset of {size} records")
        item = self._items[idx + size if idx < 0 else idx]
        return copy.deepcopy(item) if self._copy and not self._serialized else item


def _aspect_groups(items: Sequence[Any]) -> np.ndarray | None:
    """Return 1 for each record wider than high, else 0; None if a record has no size."""
    try:
        return np.array([d["width"] > d["height"] for d in items], dtype=np.uint8)
    except (KeyError, TypeError, IndexError):
        return None


def describe_record(record: object) -> str:
    """Say which image a record is about, for messages."""
    if isinstance(record, dict):
        for key in ("file_name", "image_id"):
            if key in record:
                return f"{key} '{record[key]}'"
    return "without file_name"


def _map_record(map_func: Callable[[Any], Any], record: object, where: str) -> Any:
    """Apply `map_func`; an exception gets another one around it that names the image.

    Raises:
        SampleError: what the mapper raised says that the image or its annotations are damaged.
        RuntimeError: it is another exception, a mistake in the mapper for example.
    """
    name = describe_record(record)  # before the mapper, which may change the record
    try:
        return map_func(record)
    except Exception as error:
        kind = SampleError if isinstance(error, (OSError, ValueError)) else RuntimeError
        raise kind(
            f"cannot make a sample of {where}, {name}: {type(error).__name__}: {text_of(error)}"
        ) from error


class MapDataset(torchdata.Dataset[Any]):
    """Applies a function to the elements of a dataset.

    Where the function returns None, the element is left out (iterable datasets), or replaced by
    another one, which depends on the index alone (map-style datasets). So is, up to `max_skipped`,
    an element that the function finds damaged (`OSError`, `ValueError`).

    Args:
        dataset: map-style or iterable; the result is of the same kind.
        map_func: element -> mapped element or None.
        max_skipped: how many damaged elements are replaced before one is an error; for map-style
            datasets.

    Raises:
        ValueError: `max_skipped` is negative, or given with an iterable dataset.
    """

    def __new__(cls, dataset: Any, map_func: Callable[[Any], Any], *, max_skipped: int = 0) -> Any:
        """Return an iterable dataset where the source is one."""
        if isinstance(dataset, torchdata.IterableDataset):
            if max_skipped:
                raise ValueError("damaged images of an iterable dataset cannot be skipped")
            return _MapIterableDataset(dataset, map_func)
        return super().__new__(cls)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the function by value where it is a lambda or local, for processes by spawn."""
        state = {k: v for k, v in self.__dict__.items() if k != "_map_func"}
        return _unpickled_map_dataset, (type(self), _picklable(self._map_func), state)

    def __init__(
        self, dataset: Any, map_func: Callable[[Any], Any], *, max_skipped: int = 0
    ) -> None:
        self._dataset = dataset
        self._map_func = map_func
        self._skipped = SkippedRecords(len(dataset), max_skipped) if max_skipped else None
        self._rng = random.Random(42)  # for subclasses; a replacement depends on the index alone
        self._fallback_candidates = set(range(len(dataset)))

    @property
    def aspect_groups(self) -> np.ndarray | None:
        """Groups of the dataset underneath; see `DatasetFromList.aspect_groups`."""
        return getattr(self._dataset, "aspect_groups", None)

    def record(self, idx: int) -> Any:
        """Return element `idx` of the dataset underneath, not mapped."""
        return self._dataset[idx]

    def skipped(self) -> list[str]:
        """Name the damaged elements that were replaced so far, those of loader workers included."""
        indices = self._skipped.indices() if self._skipped else []
        return [describe_record(self.record(i)) for i in indices]

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, idx: int) -> Any:
        chooser: random.Random | None = None
        current = idx
        for _ in range(MAX_RETRIES):
            try:
                mapped = _map_record(self._map_func, self._dataset[current], f"record {current}")
            except SampleError as error:
                if self._skipped is None:
                    raise
                self._skipped.add(current, error)
                mapped = None
            if mapped is not None:
                return mapped
            chooser = chooser or random.Random(derive_seed(idx, len(self)))
            current = chooser.randrange(len(self))
        raise RuntimeError(
            f"the mapper returned None for record {idx}, "
            f"{describe_record(self._dataset[idx])}, and {MAX_RETRIES - 1} replacements"
        )


def _picklable(function: Callable[[Any], Any]) -> object:
    """Return the function, or its bytes where only cloudpickle can pickle it."""
    try:
        pickle.dumps(function)
    except (pickle.PicklingError, AttributeError, TypeError):
        import cloudpickle

        return cloudpickle.dumps(function)
    return function


def _unpickled_map_dataset(kind: type, function: object, state: dict[str, Any]) -> object:
    """Make the object that `MapDataset.__reduce__` describes."""
    made: Any = torchdata.Dataset.__new__(kind)
    made.__dict__ |= state
    made._map_func = pickle.loads(function) if isinstance(function, bytes) else function
    return made


class _MapIterableDataset(torchdata.IterableDataset[Any]):
    """`MapDataset` over an iterable dataset."""

    def __init__(self, dataset: Any, map_func: Callable[[Any], Any]) -> None:
        self._dataset = dataset
        self._map_func = map_func

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[Any]:
        for i, element in enumerate(self._dataset):
            mapped = _map_record(self._map_func, element, f"element {i}")
            if mapped is not None:
                yield mapped


class ToIterableDataset(torchdata.IterableDataset[Any]):
    """Makes an iterable dataset of a map-style one and a sampler.

    Args:
        dataset: map-style.
        sampler: yields indices.
        shard_sampler: each worker process takes its share of the indices. False where the sampler
            splits by worker itself.
        shard_chunk_size: that many successive indices go to one worker.
    """

    def __init__(
        self,
        dataset: torchdata.Dataset[Any],
        sampler: Iterable[int],
        shard_sampler: bool = True,
        shard_chunk_size: int = 1,
    ) -> None:
        if isinstance(dataset, torchdata.IterableDataset):
            raise ValueError("ToIterableDataset expects a map-style dataset; this one is iterable")
        if shard_chunk_size < 1:
            raise ValueError(f"shard_chunk_size must be >= 1, got {shard_chunk_size}")
        self.dataset = dataset
        self.sampler = sampler
        self.shard_sampler = shard_sampler
        self.shard_chunk_size = shard_chunk_size

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        worker = torchdata.get_worker_info()
        indices: Iterable[int] = self.sampler
        if self.shard_sampler and worker is not None and worker.num_workers > 1:
            chunk, count, mine = self.shard_chunk_size, worker.num_workers, worker.id
            indices = (
                index
                for turn, index in zip(itertools.count(), self.sampler, strict=False)
                if turn // chunk % count == mine
            )
        for index in indices:
            yield self.dataset[index]


class AspectRatioGroupedDataset(torchdata.IterableDataset[Any]):
    """Forms batches of decoded samples that are all wider than high, or all not.

    The loaders of this library group on indices instead (`d2kit.data.build`), which decodes
    nothing to find its place; this class serves iterable datasets, whose samples come as they are.

    Args:
        dataset: yields dictionaries with `width` and `height`.
        batch_size: samples per batch.
    """

    def __init__(self, dataset: Iterable[dict[str, Any]], batch_size: int) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self._buckets: list[list[dict[str, Any]]] = [[], []]

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        for sample in self.dataset:
            bucket = self._buckets[0 if sample["width"] > sample["height"] else 1]
            bucket.append(sample)
            if len(bucket) == self.batch_size:
                batch = bucket[:]
                bucket.clear()
                yield batch
