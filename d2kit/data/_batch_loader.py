"""Which loader serves which kind of dataset and sampler."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils import data as torchdata

from d2kit.data._batches import GlobalBatches, has_global_stream, index_chunks
from d2kit.data._loader import (
    GroupedSamples,
    IterableLoader,
    SeededDataset,
    TrainLoader,
    WorkerSeed,
    outlive_stop_signals,
)
from d2kit.utils import comm
from d2kit.utils.env import seed_all_rng

__all__ = ["build_batch_data_loader", "trivial_batch_collator", "worker_init_reset_seed"]

Collate = Callable[[list[Any]], Any]


def trivial_batch_collator(batch: list[Any]) -> list[Any]:
    """Return the samples as the list they come in."""
    return batch


def worker_init_reset_seed(worker_id: int) -> None:
    """Seed the generators of a loader worker by the loader's seed and the worker's number.

    Args:
        worker_id: 0, 1, ... Samples of the training loader do not depend on it.
    """
    outlive_stop_signals()
    seed_all_rng((torch.initial_seed() + worker_id) % 2**31)


def build_batch_data_loader(
    dataset: Any,
    sampler: Any,
    total_batch_size: int | None,
    *,
    aspect_ratio_grouping: bool = False,
    num_workers: int = 0,
    collate_fn: Collate | None = None,
    drop_last: bool = True,
    single_gpu_batch_size: int | None = None,
    prefetch_factor: int | None = 2,
    persistent_workers: bool = False,
    pin_memory: bool = False,
    seed: int | None = None,
    start_batch: int = 0,
    **kwargs: Any,
) -> Any:
    """Build a loader of training batches: global ones where dataset and sampler allow it.

    A sampler without a global `stream` is iterated on each process as it is. Iterable datasets, and
    grouping over data that do not know their image sizes, group ready samples, from batch 0 only.

    Args:
        dataset: map-style (usually `MapDataset` over `DatasetFromList`) or iterable.
        sampler: of indices; None for an iterable dataset.
        total_batch_size: samples over all processes.
        aspect_ratio_grouping: images of a batch are all wider than high, or all not.
        num_workers: worker processes of this process; 0 maps in the process itself.
        collate_fn: list of samples -> batch; default: the list.
        drop_last: leave out the last batch of a finite sampler where it is not full.
        single_gpu_batch_size: samples per process, instead of `total_batch_size`.
        prefetch_factor: batches that each worker prepares ahead.
        persistent_workers: keep the workers between iterations.
        pin_memory: put tensors in page-locked memory.
        seed: of the mapper, equal on all processes; None draws one that they share.
        start_batch: number of the first global batch; nothing is decoded to get there.
        kwargs: passed to `torch.utils.data.DataLoader`.

    Returns:
        Iterable over batches, with an attribute `start_batch`.

    Raises:
        ValueError: the batch size does not fit the processes, or `start_batch` is out of reach.
    """
    local = _per_process(total_batch_size, single_gpu_batch_size, comm.get_world_size())
    options: dict[str, Any] = {"num_workers": num_workers, "pin_memory": pin_memory, **kwargs}
    if num_workers:
        options |= {"prefetch_factor": prefetch_factor, "persistent_workers": persistent_workers}
    seed = comm.shared_random_seed() if seed is None else int(seed)
    choose = _iterable if isinstance(dataset, torchdata.IterableDataset) else _map_style
    loader = choose(
        dataset, sampler, local, aspect_ratio_grouping, collate_fn, drop_last, seed, options
    )
    if start_batch:
        loader.start_batch = start_batch
    return loader


def _per_process(total: int | None, single: int | None, world_size: int) -> int:
    """Return the batch size of one process."""
    if single:
        if total:
            raise ValueError("give total_batch_size or single_gpu_batch_size, not both")
        return single
    if not total or total < 1 or total % world_size:
        raise ValueError(
            "the total batch size (SOLVER.IMS_PER_BATCH) must be a positive multiple of the number "
            f"of processes, got {total} for {world_size} processes"
        )
    return total // world_size


def _iterable(
    dataset: Any,
    sampler: Any,
    local: int,
    grouping: bool,
    collate: Collate | None,
    drop_last: bool,
    seed: int,
    options: dict[str, Any],
) -> GroupedSamples | IterableLoader:
    """Return the loader of an iterable dataset."""
    if sampler is not None:
        raise ValueError("an iterable dataset has its own order: expected sampler=None")
    options.setdefault("worker_init_fn", WorkerSeed(seed, comm.get_rank()))
    collate = collate or trivial_batch_collator
    if grouping:
        samples = torchdata.DataLoader(dataset, batch_size=None, **options)
        return GroupedSamples(samples, local, collate)
    return IterableLoader(
        dataset, batch_size=local, drop_last=drop_last, collate_fn=collate, **options
    )


def _map_style(
    dataset: Any,
    sampler: Any,
    local: int,
    grouping: bool,
    collate: Collate | None,
    drop_last: bool,
    seed: int,
    options: dict[str, Any],
) -> GroupedSamples | TrainLoader:
    """Return the loader of a map-style dataset."""
    options.setdefault("worker_init_fn", worker_init_reset_seed)
    collate = collate or trivial_batch_collator
    samples = SeededDataset(dataset, seed, options["num_workers"])
    groups = getattr(dataset, "aspect_groups", None) if grouping else None
    if grouping and groups is None:
        singles = plan_batches(sampler, 1, None, drop_last=False)
        ready = TrainLoader(samples, singles, collate_fn=_only_item, seed=seed, **options)
        return GroupedSamples(ready, local, collate)
    batches = plan_batches(sampler, local, groups, drop_last=drop_last)
    return TrainLoader(samples, batches, collate_fn=collate, seed=seed, **options)


def _only_item(batch: list[Any]) -> Any:
    """Return the sample of a batch of one."""
    return batch[0]


def plan_batches(
    sampler: Any, local: int, groups: np.ndarray | None, *, drop_last: bool
) -> GlobalBatches:
    """Return the batches of this process: slices of global ones where the sampler allows it.

    Args:
        sampler: of indices.
        local: batch size of this process.
        groups: see `GlobalBatches`.
        drop_last: see `GlobalBatches`.
    """
    world_size, rank = comm.get_world_size(), comm.get_rank()
    chunks = partial(index_chunks, sampler, local)
    if has_global_stream(sampler):
        return GlobalBatches(
            chunks,
            local * world_size,
            groups,
            rank=rank,
            world_size=world_size,
            drop_last=drop_last,
        )
    # The stream is this process's own: spread its positions so that no two processes share one.
    return GlobalBatches(
        chunks,
        local,
        groups,
        position_step=world_size,
        position_offset=rank,
        drop_last=drop_last,
    )
