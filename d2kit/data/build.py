"""Loaders for training and testing, from a config or from explicit arguments.

Training: the order of the samples, their grouping into batches and every random choice of a mapper
are functions of (seed, position in the global stream). They depend neither on the number of worker
processes nor on the number of training processes, and a loader starts at any batch at once.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.utils import data as torchdata

from d2kit.config import configurable
from d2kit.data._batch_loader import (
    build_batch_data_loader,
    trivial_batch_collator,
    worker_init_reset_seed,
)
from d2kit.data._proposals import load_proposals_into_dataset
from d2kit.data._records import (
    check_dataset_matches,
    filter_images_with_few_keypoints,
    filter_images_with_only_crowd_annotations,
    get_detection_dataset_dicts,
    print_instances_class_histogram,
)
from d2kit.data._weighted import _build_weighted_sampler
from d2kit.data.common import DatasetFromList, MapDataset
from d2kit.data.dataset_mapper import DatasetMapper
from d2kit.data.datasets._listed import register_datasets
from d2kit.data.detection_utils import check_metadata_consistency
from d2kit.data.samplers import (
    InferenceSampler,
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from d2kit.utils import comm
from d2kit.utils.registry import nearest_names

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

logger = logging.getLogger(__name__)


def build_train_sampler(cfg: Any, dataset: Any, seed: int) -> Any:
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
    cfg: Any,
    mapper: Callable[[Any], Any] | None = None,
    *,
    dataset: Any = None,
    sampler: Any = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """Translate a config to the arguments of `build_detection_train_loader`."""
    register_datasets(cfg.DATASETS.REGISTER_COCO)
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
    dataset: Any,
    *,
    mapper: Callable[[Any], Any] | None,
    sampler: Any = None,
    total_batch_size: int,
    aspect_ratio_grouping: bool = True,
    num_workers: int = 0,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    max_skipped: int = 0,
    seed: int | None = None,
    start_batch: int = 0,
    **kwargs: Any,
) -> Any:
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
    cfg: Any, dataset_name: str | list[str], mapper: Callable[[Any], Any] | None = None
) -> dict[str, Any]:
    """Translate a config to the arguments of `build_detection_test_loader`."""
    register_datasets(cfg.DATASETS.REGISTER_COCO)
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
    return torchdata.DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=False,
        num_workers=num_workers,
        collate_fn=collate_fn or trivial_batch_collator,
    )
