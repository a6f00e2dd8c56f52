"""Fits a config to the number of processes, and a loader to the iteration it starts at."""

import logging
from typing import Any

from d2kit.config import CfgNode

__all__ = ["build_iterations_cfg", "build_scaled_cfg", "start_loader_at"]

logger = logging.getLogger(__name__)


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
