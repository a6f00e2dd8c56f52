"""What is about to be trained, as text, before the first iteration."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from d2kit.config import CfgNode
from d2kit.engine.preflight.data import (
    DatasetCounts,
    count_records,
    number_of_images,
    pick_evenly,
    records_of,
    table_of_classes,
    table_of_datasets,
)
from d2kit.engine.preflight.model import (
    AnchorFit,
    estimate_memory,
    learning_rates,
    measure_anchor_fit,
    parameters_by_module,
    resized_boxes,
    spark_line,
)
from d2kit.utils import comm

__all__ = ["preflight_report", "describe_length"]


LEAST_SIDE = 8
"""Pixels, as the network sees them: two cells of the finest pyramid level (stride 4)."""

MANY = 0.1
"""Share of objects from which their size is a matter of the whole training."""


def schedule_warnings(cfg: CfgNode, max_iter: int) -> list[str]:
    """Return warnings about the schedule of a run of `max_iter` iterations."""
    solver, found = cfg.SOLVER, []
    warmup = 0 if solver.WARMUP_FACTOR >= 1 else solver.WARMUP_ITERS
    if 0 < max_iter <= warmup:
        found.append(
            f"the warm-up (SOLVER.WARMUP_ITERS {warmup}) is as long as the whole training "
            f"({max_iter} iterations) or longer: SOLVER.BASE_LR is never reached; set "
            f"SOLVER.WARMUP_ITERS to about {max(max_iter // 10, 1)}, or train longer"
        )
    elif 2 * warmup > max_iter > 0:
        found.append(
            f"the warm-up (SOLVER.WARMUP_ITERS {warmup}) takes more than half of the training "
            f"({max_iter} iterations)"
        )
    return found


def object_warnings(
    cfg: CfgNode,
    records: Sequence[Any],
    chosen: Sequence[int],
    resize: Callable[[int, int], tuple[int, int]],
) -> list[str]:
    """Return a warning where many objects are too small in the size that the network sees.

    Args:
        cfg: the config.
        records: of the training set.
        chosen: indices of those to look at.
        resize: (height, width) of an image -> that of the network's input.
    """
    from d2kit.structures import BoxMode

    small = total = 0
    for index in chosen:
        record = records[index]
        height, width = record.get("height"), record.get("width")
        if not height or not width:
            continue
        scale = resize(height, width)[0] / height
        for a in record.get("annotations", ()):
            if a.get("iscrowd", 0) or len(a["bbox"]) != 4:
                continue
            x0, y0, x1, y1 = BoxMode.convert(
                [float(v) for v in a["bbox"]], a["bbox_mode"], BoxMode.XYXY_ABS
            )
            total += 1
            small += min(x1 - x0, y1 - y0) * scale < LEAST_SIDE
    if not total or small < MANY * total:
        return []
    return [
        f"{small} of {total} objects are less than {LEAST_SIDE} pixels wide or high in the size "
        f"that the network sees (INPUT.MIN_SIZE_TRAIN {tuple(cfg.INPUT.MIN_SIZE_TRAIN)}): they are "
        "hardly found; raise it and INPUT.MIN_SIZE_TEST, or cut the images into tiles"
    ]


logger = logging.getLogger(__name__)

SPARK_POINTS = 60


def describe_length(max_iter: int, batch: int, images: int | None, seed: int | None) -> str:
    """Say how long a training is, in epochs if the number of images is known."""
    text = f"{max_iter:,} iterations"
    if images is not None:
        epochs = max_iter * batch / max(images, 1)
        text += f" = {epochs:.1f} epochs over {images:,} images"
    return f"{text}, {batch} images per iteration, seed {seed}"


def preflight_report(
    cfg: CfgNode,
    trainer: Any,
    test_counts: Mapping[str, DatasetCounts | None],
    warnings: Sequence[str] = (),
) -> str:
    """Describe data, anchors, parameters, schedule and memory of a run.

    Nothing is computed by the model. Of the training set at most ``PREFLIGHT.MAX_IMAGES`` records
    are read.

    Args:
        cfg: the config in use.
        trainer: a `DefaultTrainer`, before its first iteration.
        test_counts: of the test sets.
        warnings: what was found before; they come first.

    Returns:
        The text; only the length of the training where ``PREFLIGHT.ENABLED`` is off.
    """
    loader, limit = trainer.data_loader, cfg.PREFLIGHT.MAX_IMAGES
    length = describe_length(
        trainer.max_iter, cfg.SOLVER.IMS_PER_BATCH, number_of_images(loader), trainer.seed
    )
    if not cfg.PREFLIGHT.ENABLED:
        return length
    records = records_of(loader)
    joined = None if records is None else count_records(records, limit)
    counts = _train_counts(cfg, joined)
    counts |= {("test", name): found for name, found in test_counts.items()}
    model = comm.unwrap_model(trainer.model)
    parts: dict[str, Callable[[], str]] = {"Datasets": lambda: table_of_datasets(counts)}
    if joined is not None and records is not None:
        parts[f"Classes of {_of(joined)}"] = lambda: _class_table(cfg, joined)
        parts["Anchors"] = lambda: _anchor_text(cfg, model, records, limit)
    parts["Parameters"] = lambda: _parameter_text(model)
    parts["Learning rate (largest of all groups)"] = lambda: _rate_text(cfg, trainer)
    parts["Memory of each process"] = lambda: _memory_text(cfg, model, trainer.optimizer)
    judged = [*warnings]
    if records is not None:
        judged += _judged(cfg, records, limit)
    texts = {"Look at this first": "\n".join(f"warning: {w}" for w in judged)} if judged else {}
    texts |= {"Length": length, **{title: _told(part) for title, part in parts.items()}}
    return "\n".join(["Preflight", *(f"{k}\n{_indented(text)}" for k, text in texts.items())])


def _judged(cfg: CfgNode, records: Sequence[Any], limit: int) -> list[str]:
    """Return warnings about the sizes of objects; none where a judge fails."""
    try:
        chosen = pick_evenly(len(records), limit)
        return object_warnings(cfg, records, chosen, _shape_of_output(cfg)[0])
    except Exception:
        logger.debug("The sizes of the objects could not be judged", exc_info=True)
        return []


def _told(part: Callable[[], str]) -> str:
    """Return a part of the report; one that fails says so, and lets the training begin."""
    try:
        return part()
    except Exception as error:
        logger.debug("A part of the preflight failed", exc_info=True)
        return f"not known ({type(error).__name__}: {error})"


def _indented(text: str) -> str:
    return "\n".join(f"  {line}".rstrip() for line in text.splitlines())


# ---- data


def _of(counts: DatasetCounts) -> str:
    if counts.looked_at == counts.images:
        return "the training set"
    return f"{counts.looked_at:,} of {counts.images:,} training images"


def _train_counts(
    cfg: CfgNode, joined: DatasetCounts | None
) -> dict[tuple[str, str], DatasetCounts | None]:
    """Return the counts of each training set: as trained on, or of several as they are."""
    from d2kit.data import DatasetCatalog

    names = list(cfg.DATASETS.TRAIN)
    if len(names) == 1:
        return {("train", names[0]): joined}
    counts: dict[tuple[str, str], DatasetCounts | None] = {}
    for name in names:
        records = DatasetCatalog.get(name)
        known = isinstance(records, list)
        counts["train", name] = count_records(records, cfg.PREFLIGHT.MAX_IMAGES) if known else None
    return counts


def _class_table(cfg: CfgNode, counts: DatasetCounts) -> str:
    from d2kit.data import MetadataCatalog

    names = list(MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("thing_classes") or ())
    return table_of_classes(counts.classes, [str(name) for name in names])


# ---- anchors


def _anchor_text(cfg: CfgNode, model: nn.Module, records: Sequence[Any], limit: int) -> str:
    from d2kit.modeling.anchor_generator import DefaultAnchorGenerator

    generators = [m for m in model.modules() if isinstance(m, DefaultAnchorGenerator)]
    if not generators:
        return "none: this model has no upright anchors"
    shape, text = _shape_of_output(cfg)
    found = resized_boxes(records, shape, limit)
    if not len(found.boxes):
        return "no boxes to compare them with"
    one = generators[0]
    cells = [cell.detach().float().cpu() for cell in one.cell_anchors]
    fit = measure_anchor_fit(found, cells, one.strides, one.offset)
    return _anchor_lines(fit, text)


def _shape_of_output(cfg: CfgNode) -> tuple[Callable[[int, int], tuple[int, int]], str]:
    """Return the resizing of the training, of several lengths the middle one, and its name."""
    from d2kit.data.detection_utils import build_augmentation

    resize: Any = build_augmentation(cfg, True)[0]
    if not hasattr(resize, "short_edge_length"):
        height, width = resize.shape
        return lambda h, w: (height, width), f"{height} x {width}"
    lengths = sorted(resize.short_edge_length)
    middle = sum(lengths) // 2 if resize.is_range else lengths[len(lengths) // 2]
    text = f"short side {middle}, long side at most {resize.max_size}"
    if middle == 0:
        return lambda h, w: (h, w), "images as they are"
    return lambda h, w: resize.get_output_shape(h, w, middle, resize.max_size), text


def _anchor_lines(fit: AnchorFit, resizing: str) -> str:
    lines = [
        f"best IoU below 0.5 for {fit.poor:.1%} of {fit.boxes:,} boxes (resized: {resizing})",
        *(
            f"{name:<6} {count:>8,} boxes, {share:.1%} below"
            for name, (count, share) in fit.by_size.items()
        ),
    ]
    if fit.hint:
        sizes, share = fit.hint
        lines.append(f"MODEL.ANCHOR_GENERATOR.SIZES {sizes} would leave {share:.1%}")
    return "\n".join(lines)


# ---- model and schedule


def _parameter_text(model: nn.Module) -> str:
    from tabulate import tabulate

    rows = parameters_by_module(model)
    total = ("all", sum(row.trained for row in rows), sum(row.frozen for row in rows))
    cells = [(name, f"{trained:,}", f"{frozen:,}") for name, trained, frozen in (*rows, total)]
    heads = ["module", "trained", "frozen"]
    align = ("left", "right", "right")
    return tabulate(cells, headers=heads, colalign=align, disable_numparse=True)


def _rate_text(cfg: CfgNode, trainer: Any) -> str:
    last = trainer.max_iter - 1
    if last < 0:
        return "no iteration"
    steps = cfg.SOLVER.STEPS if cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupMultiStepLR" else ()
    places = {0, cfg.SOLVER.WARMUP_ITERS, *steps, *(last * i // 4 for i in range(5))}
    points = sorted(int(i) for i in places if 0 <= i <= last)
    rates = learning_rates(trainer.scheduler, points)
    count = min(SPARK_POINTS, last + 1)
    curve = learning_rates(trainer.scheduler, [last * i // max(count - 1, 1) for i in range(count)])
    if rates is None or curve is None:
        return f"{type(trainer.scheduler).__name__}: known only by running it"
    width = len(f"{last:,}")
    lines = [f"{i:>{width},}: {rate:.3g}" for i, rate in zip(points, rates, strict=True)]
    return "\n".join([spark_line(curve), *lines])


def _memory_text(cfg: CfgNode, model: nn.Module, optimizer: Optimizer) -> str:
    solver, world = cfg.SOLVER, comm.get_world_size()
    memory = estimate_memory(
        model,
        optimizer,
        average=solver.EMA.ENABLED,
        autocast=solver.AMP.ENABLED,
        processes=world,
    )
    parts = [f"weights {_mib(memory.weights)}", f"gradients {_mib(memory.gradients)}"]
    known = memory.optimizer is not None
    name = type(optimizer).__name__
    parts.append(f"optimizer {_mib(memory.optimizer or 0)}" if known else f"optimizer ? ({name})")
    more = {
        "average of the weights": memory.average,
        "their copies in half precision": memory.autocast,
        "buckets between processes": memory.buckets,
    }
    parts += [f"{what} {_mib(count)}" for what, count in more.items() if count]
    images = max(1, solver.IMS_PER_BATCH // world // solver.ACCUMULATE_STEPS)
    evaluation = (
        f"{_mib(memory.average)} more while the average is evaluated or saved\n"
        if memory.average
        else ""
    )
    return (
        f"{', '.join(parts)}: {_mib(memory.total())}\n{evaluation}"
        f"activations of {images} {'image' if images == 1 else 'images'} at a time come on top: "
        "they depend on the size and the content of the images and are not estimated"
    )


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
