"""Fits a config to the number of processes, and a loader to the iteration it starts at."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2kit.config import CfgNode
from d2kit.config.yaml import load_yaml
from d2kit.engine.preflight.data import (
    check_dataset_names,
    count_records,
    default_num_classes,
    records_of,
)
from d2kit.utils import comm
from d2kit.utils.file_io import atomic_write

if TYPE_CHECKING:
    from d2kit.data import Metadata


logger = logging.getLogger(__name__)

SHOWN = 20


def balanced_weights(counts: Mapping[int, int], num_classes: int) -> list[float]:
    """Return weights by which all classes that occur have the same sum over the objects.

    w[c] = N / (C * n[c]) for n[c] objects of class c, N of all, C classes that occur: the mean over
    the objects is 1. A class without objects has 1.

    Source: the "balanced" heuristic, King and Zeng 2001, section 4.2 (weighting).

    Args:
        counts: class index -> objects.
        num_classes: K.

    Returns:
        K numbers, of 6 digits.
    """
    present = [counts[c] for c in range(num_classes) if counts.get(c, 0)]
    total = sum(present)
    return [
        float(f"{total / (len(present) * counts[c]):.6g}") if counts.get(c, 0) else 1.0
        for c in range(num_classes)
    ]


def build_class_weights_cfg(cfg: CfgNode, loader: Any) -> CfgNode:
    """Put numbers in the place of ``MODEL.ROI_HEADS.CLASS_WEIGHTS`` "balanced".

    They depend on the training records alone, so that all processes and a resumed run find the
    same; the checkpoints keep the config with them, and other numbers are refused on resume.

    Args:
        cfg: a full config; not changed.
        loader: the training loader.

    Returns:
        `cfg` itself where the weights are not "balanced", else a copy with a list.

    Raises:
        ValueError: if they are another word, or the training set does not tell its objects.
    """
    given = cfg.MODEL.ROI_HEADS.CLASS_WEIGHTS
    if not isinstance(given, str) or not given:
        return cfg
    if given != "balanced":
        raise ValueError(
            f"MODEL.ROI_HEADS.CLASS_WEIGHTS: expected a list, 'balanced' or None, got '{given}'"
        )
    records = records_of(loader)
    counts = count_records(records) if records is not None else None
    if counts is None or not counts.objects:
        raise ValueError(
            "MODEL.ROI_HEADS.CLASS_WEIGHTS 'balanced' needs a training set of records with "
            "annotations (build_detection_train_loader); write one weight per class instead"
        )
    frozen = cfg.is_frozen()
    cfg = cfg.clone()
    cfg.defrost()
    weights = balanced_weights(counts.classes, cfg.MODEL.ROI_HEADS.NUM_CLASSES)
    cfg.MODEL.ROI_HEADS["CLASS_WEIGHTS"] = weights  # in place of a word
    logger.info(
        "Class weights, balanced over %s objects: %s; background 1",
        f"{counts.objects:,}",
        _build_text(cfg, weights),
    )
    if frozen:
        cfg.freeze()
    return cfg


def _build_text(cfg: CfgNode, weights: list[float]) -> str:
    """Name the classes with their weights, of many only the extremes."""
    from d2kit.data import MetadataCatalog

    names = list(MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("thing_classes") or ())
    if len(names) != len(weights):
        names = [f"class {c}" for c in range(len(weights))]
    order = sorted(range(len(weights)), key=lambda c: (weights[c], c))
    shown = order if len(order) <= SHOWN else [*order[: SHOWN // 2], *order[-SHOWN // 2 :]]
    text = ", ".join(f"{names[c]} {weights[c]:g}" for c in shown)
    left = len(order) - len(shown)
    return f"{text} ({left} classes between left out)" if left else text


def default_check_datasets(cfg: CfgNode, names: Iterable[str]) -> None:
    """Register the datasets that a config lists, and make sure that `names` are registered.

    Raises:
        KeyError: if one is not; the nearest names are listed.
        ValueError: if DATASETS.REGISTER_COCO is wrong.
    """
    from d2kit.data import register_datasets

    register_datasets(cfg.DATASETS.REGISTER_COCO)
    check_dataset_names(names)


def build_metadata(cfg: CfgNode) -> Metadata:
    """Return what is known of a model's classes without reading a dataset.

    It is the metadata of the first test set (without one: training set). Where these do not have
    the names of MODEL.CLASS_NAMES it is a copy that has them: the model knows its classes on a
    machine without its datasets.
    """
    from d2kit.data import Metadata, MetadataCatalog, register_datasets

    register_datasets(cfg.DATASETS.REGISTER_COCO)
    datasets = (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN)
    metadata = MetadataCatalog.get(datasets[0] if datasets else "__unused")
    names = list(cfg.MODEL.CLASS_NAMES)
    if not names or names == metadata.get("thing_classes"):
        return metadata
    return Metadata(**{**metadata.as_dict(), "thing_classes": names})


def build_class_names(cfg: CfgNode) -> list[str]:
    """Return the names of a model's classes in the order of their ids.

    They come from MODEL.CLASS_NAMES, the metadata of the first test (or training) set, or its
    annotations, if they are there; else they are numbers, "0", "1", ...
    """
    from d2kit.data import DatasetCatalog

    metadata = build_metadata(cfg)
    names, dataset = metadata.get("thing_classes"), metadata.name
    if (
        names is None
        and os.path.isfile(metadata.get("json_file") or "")
        and (dataset in DatasetCatalog)
    ):
        DatasetCatalog.get(dataset)  # a dataset of one's own tells its classes when it is read
        names = metadata.get("thing_classes")
    count = default_num_classes(cfg) or cfg.MODEL.ROI_HEADS.NUM_CLASSES
    return list(names or map(str, range(count)))


def build_trained_classes(cfg: CfgNode) -> tuple[list[str], str]:
    """Return the names of a model's classes as its training had them, and where they stand.

    They come from MODEL.CLASS_NAMES, else from the first training set where it is at hand; none
    where they are not known or of another number than the model's classes.
    """
    from d2kit.data import DatasetCatalog, DatasetError, MetadataCatalog
    from d2kit.data.datasets.validate import read_json

    if cfg.MODEL.CLASS_NAMES:
        return list(cfg.MODEL.CLASS_NAMES), "the model (MODEL.CLASS_NAMES)"
    name = next(iter(cfg.DATASETS.TRAIN), "")
    if name not in DatasetCatalog:
        return [], ""
    metadata = MetadataCatalog.get(name)
    names = metadata.get("thing_classes")
    file = metadata.get("json_file") or ""
    if names is None and os.path.isfile(file):
        try:
            categories = read_json(file, file).get("categories") or []
            names = [c["name"] for c in sorted(categories, key=lambda c: c["id"])]
        except (DatasetError, KeyError, TypeError):
            names = None  # the training set's damage is no matter of an evaluation
    if not names or len(names) != default_num_classes(cfg):
        return [], ""
    return [str(n) for n in names], f"training set '{name}'"


def build_named_cfg(cfg: CfgNode) -> CfgNode:
    """Return a copy of a training's config with the names of its classes in MODEL.CLASS_NAMES.

    Call it after the training sets were loaded. Rank 0 writes the names into ``config.yaml`` in
    OUTPUT_DIR too, if `default_setup` has written that.

    Raises:
        ValueError: if the config has other names.
    """
    from d2kit.data import MetadataCatalog

    metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0] if cfg.DATASETS.TRAIN else "__unused")
    names = list(map(str, metadata.get("thing_classes") or ()))
    given = list(cfg.MODEL.CLASS_NAMES)
    if not names or given == names:
        return cfg
    if given:
        raise ValueError(
            f"MODEL.CLASS_NAMES is {_some(given)}, but the classes of dataset '{metadata.name}' "
            f'are {_some(names)}; remove the key, or set it to "[]", to train with these'
        )
    frozen = cfg.is_frozen()
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.CLASS_NAMES = names
    if frozen:
        cfg.freeze()
    if comm.is_main_process():
        _write_names(Path(cfg.OUTPUT_DIR) / "config.yaml", names)
    return cfg


def _write_names(file: Path, names: list[str]) -> None:
    if not file.is_file():
        return
    values = load_yaml(file).values
    values.setdefault("MODEL", {})["CLASS_NAMES"] = names
    with atomic_write(file, "w") as stream:
        stream.write(CfgNode(values).dump())


def _some(names: list[str]) -> str:
    return f"[{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}] ({len(names)})"


def build_scaled_cfg(cfg: CfgNode, num_workers: int) -> CfgNode:
    """Do what `DefaultTrainer.auto_scale_workers` documents."""
    return _build_world_cfg(_build_batch_cfg(cfg), num_workers)


def _build_batch_cfg(cfg: CfgNode) -> CfgNode:
    """Scale BASE_LR to IMS_PER_BATCH, which REFERENCE_BATCH then is: a second call does nothing."""
    batch, reference = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_BATCH
    if reference in (0, batch):
        return cfg
    if reference < 0:
        raise ValueError(
            f"SOLVER.REFERENCE_BATCH: expected the number of images per iteration that "
            f"SOLVER.BASE_LR was written for, or 0 to leave it, got {reference}"
        )
    frozen = cfg.is_frozen()
    cfg = cfg.clone()
    cfg.defrost()
    before = cfg.SOLVER.BASE_LR
    cfg.SOLVER.BASE_LR = before * batch / reference
    cfg.SOLVER.REFERENCE_BATCH = batch
    logger.info(
        "Scaled BASE_LR from %g for %d images per iteration to %g for %d (SOLVER.REFERENCE_BATCH)",
        before,
        reference,
        cfg.SOLVER.BASE_LR,
        batch,
    )
    if frozen:
        cfg.freeze()
    return cfg


def _build_world_cfg(cfg: CfgNode, num_workers: int) -> CfgNode:
    """Scale batch, rate and schedule from REFERENCE_WORLD_SIZE to the number of processes."""
    old = cfg.SOLVER.REFERENCE_WORLD_SIZE
    if old in (0, num_workers):
        return cfg
    frozen = cfg.is_frozen()
    cfg = cfg.clone()
    cfg.defrost()
    solver, scale = cfg.SOLVER, num_workers / old
    if solver.IMS_PER_BATCH % old:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH} is not a multiple of "
            f"SOLVER.REFERENCE_WORLD_SIZE {old}"
        )
    solver.IMS_PER_BATCH = round(solver.IMS_PER_BATCH * scale)
    solver.BASE_LR *= scale
    if solver.REFERENCE_BATCH:  # BASE_LR is for the new batch now
        solver.REFERENCE_BATCH = solver.IMS_PER_BATCH
    solver.MAX_ITER = round(solver.MAX_ITER / scale)
    solver.WARMUP_ITERS = round(solver.WARMUP_ITERS / scale)
    solver.STEPS = tuple(round(step / scale) for step in solver.STEPS)
    solver.CHECKPOINT_PERIOD = max(round(solver.CHECKPOINT_PERIOD / scale), 1)
    cfg.TEST.EVAL_PERIOD = round(cfg.TEST.EVAL_PERIOD / scale)
    solver.REFERENCE_WORLD_SIZE = num_workers
    logger.info(
        "Scaled from %d to %d processes: IMS_PER_BATCH %d, BASE_LR %g, MAX_ITER %d, "
        "WARMUP_ITERS %d, STEPS %s",
        old,
        num_workers,
        solver.IMS_PER_BATCH,
        solver.BASE_LR,
        solver.MAX_ITER,
        solver.WARMUP_ITERS,
        solver.STEPS,
    )
    if frozen:
        cfg.freeze()
    return cfg


def build_iterations_cfg(cfg: CfgNode, images: int | None) -> CfgNode:
    """Turn a schedule in epochs (``SOLVER.MAX_EPOCHS``) into one in iterations.

    Epoch e ends at iteration round(e x images / IMS_PER_BATCH): batches run over the end of a pass.

    Steps at or after the end are left out, as those of SOLVER.STEPS are: a recipe may say "every 3
    epochs" and be stopped after 2.

    Args:
        cfg: a full config; not changed.
        images: in one pass over the training set; None: unknown.

    Returns:
        `cfg` itself where it counts in iterations, else a copy with MAX_ITER, STEPS and, with
        ``TEST.EVAL_EPOCHS``, EVAL_PERIOD set.

    Raises:
        ValueError: if a number of epochs is negative, a step is not above 0 or without MAX_EPOCHS,
            or the size of the training set is unknown.
    """
    solver = cfg.SOLVER
    if solver.MAX_EPOCHS == 0 and not solver.STEPS_EPOCHS and cfg.TEST.EVAL_EPOCHS == 0:
        return cfg
    if not images:
        raise ValueError(
            "a schedule in epochs (SOLVER.MAX_EPOCHS, TEST.EVAL_EPOCHS) needs a training set with "
            "a length; this one has none: use SOLVER.MAX_ITER, SOLVER.STEPS, TEST.EVAL_PERIOD"
        )
    steps = tuple(solver.STEPS_EPOCHS)
    if solver.MAX_EPOCHS < 0 or any(step <= 0 for step in steps):
        raise ValueError(
            f"SOLVER.STEPS_EPOCHS {steps}, SOLVER.MAX_EPOCHS {solver.MAX_EPOCHS:g}: expected "
            "positive numbers of epochs"
        )
    if steps and not solver.MAX_EPOCHS:
        raise ValueError(f"SOLVER.STEPS_EPOCHS {steps} needs SOLVER.MAX_EPOCHS, which is 0")
    kept = [step for step in steps if step < solver.MAX_EPOCHS]
    if len(kept) < len(steps):
        late = tuple(step for step in steps if step not in kept)
        text = "SOLVER.STEPS_EPOCHS %s are not below SOLVER.MAX_EPOCHS %g: no decay happens there"
        logger.info(text, late, solver.MAX_EPOCHS)
    per_epoch = images / solver.IMS_PER_BATCH
    frozen = cfg.is_frozen()
    cfg = cfg.clone()
    cfg.defrost()
    if cfg.SOLVER.MAX_EPOCHS:
        cfg.SOLVER.MAX_ITER = max(1, round(cfg.SOLVER.MAX_EPOCHS * per_epoch))
        cfg.SOLVER.STEPS = tuple(round(step * per_epoch) for step in kept)
    if cfg.TEST.EVAL_EPOCHS:
        cfg.TEST.EVAL_PERIOD = max(1, round(cfg.TEST.EVAL_EPOCHS * per_epoch))
    if frozen:
        cfg.freeze()
    return cfg


def start_loader_at(loader: Any, batch: int) -> None:
    """Let a loader begin with a later batch, so that a resumed run sees what it would have seen.

    Args:
        loader: one of `build_detection_train_loader`; others begin anew, with a warning.
        batch: number of the global batch.
    """
    if isinstance(getattr(type(loader), "start_batch", None), property):
        loader.start_batch = batch
    else:
        logger.warning(
            "The training loader (%s) cannot start at batch %d: the resumed run sees its data from "
            "the beginning; loaders of build_detection_train_loader with a map-style dataset can",
            type(loader).__name__,
            batch,
        )
