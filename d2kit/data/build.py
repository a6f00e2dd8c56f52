"""Loaders for training and testing, from a config or from explicit arguments.

Training: the order of the samples, their grouping into batches and every random choice of a mapper
are functions of (seed, position in the global stream). They depend neither on the number of worker
processes nor on the number of training processes, and a loader starts at any batch at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils import data as torchdata

from d2kit.config import CfgNode, configurable
from d2kit.data.common import (
    DatasetFromList,
    GlobalBatches,
    MapDataset,
    has_global_stream,
    index_chunks,
)
from d2kit.data.dataset_mapper import DatasetMapper
from d2kit.data.datasets.builtin import register_datasets
from d2kit.data.datasets.coco import set_strict_annotations
from d2kit.data.detection_utils import check_metadata_consistency
from d2kit.data.loader import (
    GroupedSamples,
    IterableLoader,
    SeededDataset,
    TestLoader,
    TrainLoader,
    WorkerSeed,
    outlive_stop_signals,
)
from d2kit.data.records import (
    _build_weighted_sampler,
    check_dataset_matches,
    filter_images_with_few_keypoints,
    filter_images_with_only_crowd_annotations,
    get_detection_dataset_dicts,
    load_proposals_into_dataset,
    print_instances_class_histogram,
)
from d2kit.data.samplers import (
    InferenceSampler,
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from d2kit.utils import comm
from d2kit.utils.env import seed_all_rng
from d2kit.utils.names import nearest_names

__all__ = [
    "_build_weighted_sampler",
    "build_batch_data_loader",
    "build_detection_test_loader",
    "build_detection_train_loader",
    "check_dataset_matches",
    "check_metadata_consistency",
    "filter_images_with_few_keypoints",
    "filter_images_with_only_crowd_annotations",
    "get_detection_dataset_dicts",
    "load_proposals_into_dataset",
    "print_instances_class_histogram",
    "trivial_batch_collator",
    "worker_init_reset_seed",
]


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
    dataset: object,
    sampler: object,
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
    **kwargs: object,
) -> Iterable[Any]:
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
    sampler: object,
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
        samples = IterableLoader(dataset, batch_size=None, **options)
        return GroupedSamples(samples, local, collate)
    return IterableLoader(
        dataset, batch_size=local, drop_last=drop_last, collate_fn=collate, **options
    )


def _map_style(
    dataset: object,
    sampler: object,
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


def _only_item(batch: list[Any]) -> object:
    """Return the sample of a batch of one."""
    return batch[0]


def plan_batches(
    sampler: object, local: int, groups: np.ndarray | None, *, drop_last: bool
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
    count = partial(len, sampler) if hasattr(sampler, "__len__") else None
    if has_global_stream(sampler):
        return GlobalBatches(
            chunks,
            local * world_size,
            groups,
            rank=rank,
            world_size=world_size,
            drop_last=drop_last,
            count=count,
        )
    # The stream is this process's own: spread its positions so that no two processes share one.
    return GlobalBatches(
        chunks,
        local,
        groups,
        position_step=world_size,
        position_offset=rank,
        drop_last=drop_last,
        count=count,
    )


logger = logging.getLogger(__name__)


def build_train_sampler(cfg: CfgNode, dataset: Any, seed: int) -> Iterable[int]:
    """Return the sampler that DATALOADER.SAMPLER_TRAIN names."""
    name = cfg.DATALOADER.SAMPLER_TRAIN
    logger.info("Using training sampler %s", name)
    if name == "TrainingSampler":
        return TrainingSampler(len(dataset), seed=seed)
    if name == "RepeatFactorTrainingSampler":
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            dataset, cfg.DATALOADER.REPEAT_THRESHOLD, sqrt=cfg.DATALOADER.REPEAT_SQRT
        )
        return RepeatFactorTrainingSampler(factors, seed=seed)
    if name == "RandomSubsetTrainingSampler":
        ratio = cfg.DATALOADER.get("RANDOM_SUBSET_RATIO", 1.0)
        return RandomSubsetTrainingSampler(len(dataset), ratio, seed_shuffle=seed, seed_subset=seed)
    if name in ("WeightedTrainingSampler", "WeightedCategoryTrainingSampler"):
        return _build_weighted_sampler(cfg, name == "WeightedCategoryTrainingSampler", seed)
    known = ["TrainingSampler", "RepeatFactorTrainingSampler", "RandomSubsetTrainingSampler"]
    known += ["WeightedTrainingSampler", "WeightedCategoryTrainingSampler"]
    near = nearest_names(name, known) or known
    raise ValueError(f"unknown DATALOADER.SAMPLER_TRAIN '{name}'; nearest: {', '.join(near)}")


def _train_loader_from_config(
    cfg: CfgNode,
    mapper: Callable[[Any], Any] | None = None,
    *,
    dataset: object = None,
    sampler: object = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """Translate a config to the arguments of `build_detection_train_loader`."""
    register_datasets(cfg.DATASETS.REGISTER_COCO)
    set_strict_annotations(cfg.DATASETS.STRICT_ANNOTATIONS)
    if dataset is None:
        keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
        dataset = get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=keypoints if cfg.MODEL.KEYPOINT_ON else 0,
            proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
        )
    if seed is None:
        seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    if sampler is None and not isinstance(dataset, torchdata.IterableDataset):
        sampler = build_train_sampler(cfg, dataset, seed)
    return {
        "dataset": dataset,
        "sampler": sampler,
        "mapper": DatasetMapper(cfg, True) if mapper is None else mapper,
        "total_batch_size": cfg.SOLVER.IMS_PER_BATCH,
        "aspect_ratio_grouping": cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
        "max_skipped": cfg.DATALOADER.MAX_SKIPPED_IMAGES,
        "seed": seed,
    }


@configurable(from_config=_train_loader_from_config)
def build_detection_train_loader(
    dataset: object,
    *,
    mapper: Callable[[Any], Any] | None,
    sampler: object = None,
    total_batch_size: int,
    aspect_ratio_grouping: bool = True,
    num_workers: int = 0,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    max_skipped: int = 0,
    seed: int | None = None,
    start_batch: int = 0,
    **kwargs: Any,
) -> Iterable[Any]:
    """Build the loader for training; also called as `build_detection_train_loader(cfg, ...)`.

    Args:
        dataset: list of records, or a `torch.utils.data.Dataset` of them, map-style or iterable.
        mapper: record -> sample, called in the workers; None leaves the records as they are.
        sampler: of indices; None means `TrainingSampler` (for an iterable dataset: none).
        total_batch_size: samples over all processes (SOLVER.IMS_PER_BATCH).
        aspect_ratio_grouping: batches of images that are all wider than high, or all not.
        num_workers: worker processes per training process.
        collate_fn: list of samples -> batch; default: the list.
        max_skipped: how many damaged images are replaced by others before one is an error.
        seed: of order and augmentation, equal on all processes; default with a config: SEED where
            it is >= 0; otherwise one is drawn that the processes share.
        start_batch: number of the first global batch, for resuming.
        kwargs: further arguments of `build_batch_data_loader`.

    Returns:
        Infinite iterable over this process's share of the batches. A sample that is a dictionary
        also has `sample_seed`, for random choices that the model makes for it.

    Raises:
        ValueError: see `build_batch_data_loader`; the dataset is empty.
    """
    seed = comm.shared_random_seed() if seed is None else int(seed)
    dataset, sampler = _mapped(
        dataset, mapper, sampler, partial(TrainingSampler, seed=seed), max_skipped
    )
    return build_batch_data_loader(
        dataset,
        sampler,
        total_batch_size,
        aspect_ratio_grouping=aspect_ratio_grouping,
        num_workers=num_workers,
        collate_fn=collate_fn,
        seed=seed,
        start_batch=start_batch,
        **kwargs,
    )


def _public_arguments(cfg: CfgNode, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Translate a config to the arguments that Detectron2's function has too.

    User code passes them on to loaders of its own; called with a config, the loader also takes
    DATALOADER.MAX_SKIPPED_IMAGES.
    """
    arguments = _train_loader_from_config(cfg, *args, **kwargs)
    del arguments["max_skipped"]
    return arguments


build_detection_train_loader.from_config = _public_arguments


def _mapped(
    dataset: Any,
    mapper: Callable[[Any], Any] | None,
    sampler: Any,
    default_sampler: Callable[[int], Any],
    max_skipped: int = 0,
) -> tuple[Any, Any]:
    """Return a dataset of samples and what samples its indices (None for an iterable one).

    Args:
        dataset: list of records or dataset.
        mapper: record -> sample, or None.
        sampler: of the user, or None.
        default_sampler: number of records -> sampler.
        max_skipped: damaged images that are replaced.
    """
    if isinstance(dataset, (list, tuple)):
        dataset = DatasetFromList(dataset, copy=False)
    iterable = isinstance(dataset, torchdata.IterableDataset)
    if iterable and sampler is not None:
        raise ValueError("an iterable dataset has its own order: expected sampler=None")
    if not iterable and sampler is None:
        sampler = default_sampler(len(dataset))
    if mapper is not None:
        dataset = MapDataset(dataset, mapper, max_skipped=max_skipped)
    return dataset, sampler


def _test_loader_from_config(
    cfg: CfgNode, dataset_name: str | list[str], mapper: Callable[[Any], Any] | None = None
) -> dict[str, Any]:
    """Translate a config to the arguments of `build_detection_test_loader`."""
    register_datasets(cfg.DATASETS.REGISTER_COCO)
    set_strict_annotations(cfg.DATASETS.STRICT_ANNOTATIONS)
    names = [dataset_name] if isinstance(dataset_name, str) else list(dataset_name)
    proposal_files = None
    if cfg.MODEL.LOAD_PROPOSALS:
        known, files = list(cfg.DATASETS.TEST), list(cfg.DATASETS.PROPOSAL_FILES_TEST)
        if len(files) != len(known):
            raise ValueError(
                "MODEL.LOAD_PROPOSALS needs one file in DATASETS.PROPOSAL_FILES_TEST for each of "
                f"DATASETS.TEST {known}, got {files}"
            )
        proposal_files = [files[known.index(name)] for name in names]
    dataset = get_detection_dataset_dicts(names, filter_empty=False, proposal_files=proposal_files)
    return {
        "dataset": dataset,
        "mapper": DatasetMapper(cfg, False) if mapper is None else mapper,
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
    }


@configurable(from_config=_test_loader_from_config)
def build_detection_test_loader(
    dataset: Any,
    *,
    mapper: Callable[[Any], Any] | None,
    sampler: Any = None,
    batch_size: int = 1,
    num_workers: int = 0,
    collate_fn: Callable[[list[Any]], Any] | None = None,
) -> torchdata.DataLoader[Any]:
    """Build the loader for testing; also called as `build_detection_test_loader(cfg, name)`.

    Args:
        dataset: list of records, or a `torch.utils.data.Dataset` of them.
        mapper: record -> sample; None leaves the records as they are.
        sampler: of indices; None means `InferenceSampler` (for an iterable dataset: none).
        batch_size: samples per batch of this process.
        num_workers: worker processes.
        collate_fn: list of samples -> batch; default: the list.

    Returns:
        Loader that gives each record of this process's part once, in order; the last batch may be
        smaller.

    Raises:
        ValueError: the dataset is empty, or an iterable one has a sampler.
    """
    dataset, sampler = _mapped(dataset, mapper, sampler, InferenceSampler)
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "sampler": sampler,
        "drop_last": False,
        "num_workers": num_workers,
        "collate_fn": collate_fn or trivial_batch_collator,
    }
    if isinstance(dataset, torchdata.IterableDataset):
        return IterableLoader(dataset, **options)
    return TestLoader(dataset, **options)
