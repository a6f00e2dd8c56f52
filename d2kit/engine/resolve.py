"""Turns the config that a user gives into the config of the run, once, and says what it changed.

Seed, device, precision, scaling, epochs, class names and class weights are decided here, in this
order, each on what the ones before it decided. Nothing rewrites the config afterwards.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from d2kit.config import CfgNode
from d2kit.config.yaml import load_yaml
from d2kit.engine.preflight.data import (
    DatasetCounts,
    check_dataset_names,
    count_records,
    number_of_classes,
    number_of_images,
    records_of,
)
from d2kit.engine.trainers import amp_precision, check_accumulation
from d2kit.utils import comm
from d2kit.utils.devices import choose_device, computes_bfloat16
from d2kit.utils.file_io import atomic_write
from d2kit.utils.names import flatten

__all__ = ["Change", "Run", "build_run", "choose_precision", "choose_seed", "describe_changes"]


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


def build_class_weights_cfg(cfg: CfgNode, loader: object) -> CfgNode:
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
        _weights_text(cfg, weights),
    )
    if frozen:
        cfg.freeze()
    return cfg


def _weights_text(cfg: CfgNode, weights: list[float]) -> str:
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


def register_listed_datasets(cfg: CfgNode, names: Iterable[str]) -> None:
    """Register the datasets that a config lists, and make sure that `names` are registered.

    Raises:
        KeyError: if one is not; the nearest names are listed.
        ValueError: if DATASETS.REGISTER_COCO is wrong.
    """
    from d2kit.data import register_datasets
    from d2kit.data.datasets.coco import set_strict_annotations

    register_datasets(cfg.DATASETS.REGISTER_COCO)
    set_strict_annotations(cfg.DATASETS.STRICT_ANNOTATIONS)
    check_dataset_names(names)


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
    if not names or len(names) != number_of_classes(cfg):
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
    cfg.SOLVER.BASE_LR = cfg.SOLVER.BASE_LR * batch / reference
    cfg.SOLVER.REFERENCE_BATCH = batch
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


LONGEST = 48  # characters of a value in the table


@dataclasses.dataclass(frozen=True)
class Change:
    """One key that differs between what the user gave and what the run uses."""

    key: str
    given: Any
    used: Any
    why: str


@dataclasses.dataclass(frozen=True)
class Run:
    """What a training works with.

    Attributes:
        cfg: the config of the run, frozen.
        loader: the training loader, built of it.
        changes: what differs from the config that was given.
        test_counts: test set -> what it holds; None for one that is no list of records.
    """

    cfg: CfgNode
    loader: Any
    changes: list[Change]
    test_counts: dict[str, DatasetCounts | None]


class _Changes:
    """Applies steps to a config, and notes what each of them changed."""

    def __init__(self, cfg: CfgNode) -> None:
        self.cfg = cfg
        self.rows: dict[str, Change] = {}

    def take(self, cfg: CfgNode, why: str) -> None:
        """Make `cfg` the config from here on."""
        before, after = flatten(self.cfg), flatten(cfg)
        for key, value in after.items():
            if before.get(key) != value:
                first = self.rows[key].given if key in self.rows else before.get(key)
                self.rows[key] = Change(key, first, value, why)
        self.cfg = cfg


def build_run(
    cfg: CfgNode,
    *,
    scale: Callable[[CfgNode, int], CfgNode],
    build_loader: Callable[[CfgNode], Any],
    check_datasets: Callable[[CfgNode, Any], dict[str, DatasetCounts | None]],
) -> Run:
    """Resolve the config of a training, build its loader on the way, and log the changes.

    Args:
        cfg: what the user gave, with its datasets registered; not changed.
        scale: `DefaultTrainer.auto_scale_workers`: (cfg, processes) -> scaled config.
        build_loader: `DefaultTrainer.build_train_loader`. Epochs, names and class weights are
            facts of the training set, which is read when its loader is built.
        check_datasets: (cfg, loader) -> what each test set holds; refuses what mapper, model or
            evaluator would.

    Raises:
        ValueError: if datasets, batch, schedule, classes or precision do not fit each other.
    """
    processes = comm.get_world_size()
    changes = _Changes(cfg)
    changes.take(scale(cfg, processes), f"scaled to the batch and to {processes} process(es)")
    changes.take(_build_seeded(changes.cfg), "drawn: repeat the run with it")
    changes.take(*_build_machine_cfg(changes.cfg))
    solver = changes.cfg.SOLVER
    check_accumulation(solver.IMS_PER_BATCH, processes, solver.ACCUMULATE_STEPS)
    loader = build_loader(changes.cfg)
    images = number_of_images(loader)
    in_iterations = build_iterations_cfg(changes.cfg, images)
    changes.take(in_iterations, f"from epochs of {images} images")
    test_counts = check_datasets(changes.cfg, loader)
    changes.take(build_named_cfg(changes.cfg), "names of the training set")
    weighted = build_class_weights_cfg(changes.cfg, loader)
    changes.take(weighted, "balanced over the training set")
    rows = list(changes.rows.values())
    if rows and comm.is_main_process():
        logger.info("Config keys that the run sets:\n%s", describe_changes(rows))
    return Run(changes.cfg, loader, rows, test_counts)


def _build_seeded(cfg: CfgNode) -> CfgNode:
    """Return a frozen copy with a seed, the same in all processes."""
    seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SEED = seed
    cfg.freeze()
    return cfg


def _build_machine_cfg(cfg: CfgNode) -> tuple[CfgNode, str]:
    """Return a frozen copy with what this machine has (device, precision, compiler), and why."""
    from d2kit.modeling.compiling import choose_compile_mode

    device = choose_device(cfg.MODEL.DEVICE)
    cfg = cfg.clone()
    cfg.defrost()
    why = []
    if torch.device(device).type == "cpu" and cfg.MODEL.DEVICE != "cpu":
        why.append(f"this machine has no {cfg.MODEL.DEVICE}")
        cfg.MODEL.DEVICE = "cpu"
    if cfg.SOLVER.AMP.ENABLED and choose_precision(cfg.SOLVER.AMP.PRECISION, device) is None:
        why.append(f"no native bfloat16 on this {device.type.upper()}: float32")
        cfg.SOLVER.AMP.ENABLED = False
    mode, reason = choose_compile_mode(cfg.MODEL.COMPILE, device, deterministic=cfg.DETERMINISTIC)
    if reason:
        why.append(reason)
        cfg.MODEL.COMPILE = mode
    cfg.freeze()
    return cfg, "; ".join(why)


def choose_precision(name: str, device: torch.device) -> torch.dtype | None:
    """Return the type of a forward pass in mixed precision on a device.

    Args:
        name: "float16" or "bfloat16" (SOLVER.AMP.PRECISION).
        device: of the model.

    Returns:
        None for float32, with a log line: where bfloat16 is not native it is emulated, slower than
        float32 and less exact.

    Raises:
        ValueError: for another name.
    """
    precision = amp_precision(name)
    if precision is torch.bfloat16 and not computes_bfloat16(device):
        logger.warning(
            "SOLVER.AMP: this %s does not compute bfloat16 natively, which would be slower: "
            "training in float32",
            device.type.upper(),
        )
        return None
    return precision


def choose_seed(seed: int, output_dir: str, *, resume: bool) -> int:
    """Return `seed`; a negative one becomes that of the run to resume, or a new one.

    Args:
        seed: as given.
        output_dir: folder of the checkpoints.
        resume: whether to look for a checkpoint there.

    Returns:
        The same number in all processes.
    """
    if seed >= 0:
        return seed
    found: int | None = None
    if resume and comm.is_main_process():
        from d2kit.checkpoint import DetectionCheckpointer
        from d2kit.checkpoint.files import read_checkpoint

        path = DetectionCheckpointer(nn.Module(), output_dir).get_checkpoint_file()
        trainer = read_checkpoint(Path(path)).get("trainer") if path else None
        found = trainer.get("seed") if isinstance(trainer, dict) else None
    found = comm.all_gather(found)[0]
    return comm.shared_random_seed() if found is None else found


def describe_changes(changes: list[Change]) -> str:
    """Return changes as a table, one line per key."""
    from tabulate import tabulate

    rows = [(c.key, _short(c.given), _short(c.used), c.why) for c in changes]
    return tabulate(rows, headers=["key", "given", "used", "why"], disable_numparse=True)


def _short(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 4]} ..."
