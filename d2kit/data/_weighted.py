"""Sampling of several datasets by weights."""

from __future__ import annotations

from typing import Any

import torch

from d2kit.data._records import get_detection_dataset_dicts
from d2kit.data.samplers import RepeatFactorTrainingSampler

__all__ = ["_build_weighted_sampler"]


def _build_weighted_sampler(
    cfg: Any, enable_category_balance: bool = False, seed: int | None = None
) -> RepeatFactorTrainingSampler:
    """Build a sampler that repeats the images of each training set by a factor.

    Args:
        cfg: ``DATASETS.TRAIN_REPEAT_FACTOR`` holds pairs (dataset, factor); a dataset that is not
            among them has 1.
        enable_category_balance: multiply by the repeat factors that ``DATALOADER.REPEAT_THRESHOLD``
            and ``REPEAT_SQRT`` give each image within its dataset, scaled so that the least is 1.
        seed: of rounding and order; None draws one that the processes share.

    Returns:
        The sampler, over the images of all DATASETS.TRAIN in their order.

    Raises:
        ValueError: a factor is for a dataset that is not in DATASETS.TRAIN.
    """
    names = list(cfg.DATASETS.TRAIN)
    given = {name: float(factor) for name, factor in cfg.DATASETS.get("TRAIN_REPEAT_FACTOR", ())}
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise ValueError(
            f"DATASETS.TRAIN_REPEAT_FACTOR names {', '.join(unknown)}, but DATASETS.TRAIN is "
            f"{', '.join(names)}"
        )
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
    factors = []
    for name in names:
        records = get_detection_dataset_dicts(
            name,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=keypoints,
            check_consistency=False,
        )
        factor = torch.full((len(records),), given.get(name, 1.0))
        if enable_category_balance:
            factor *= RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
                records, cfg.DATALOADER.REPEAT_THRESHOLD, sqrt=cfg.DATALOADER.REPEAT_SQRT
            )
        factors.append(factor)
    joined = torch.cat(factors)
    if enable_category_balance:
        joined = joined / joined[joined > 0].min()
    return RepeatFactorTrainingSampler(joined, seed=seed)
