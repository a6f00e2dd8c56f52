"""Judges a run before it begins: what is allowed, and will not do what its author wants."""

from collections.abc import Callable, Sequence
from typing import Any

from d2kit.config import CfgNode

__all__ = ["build_object_warnings", "build_schedule_warnings"]

LEAST_SIDE = 8
"""Pixels, as the network sees them: two cells of the finest pyramid level (stride 4)."""

MANY = 0.1
"""Share of objects from which their size is a matter of the whole training."""


def build_schedule_warnings(cfg: CfgNode, max_iter: int) -> list[str]:
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


def build_object_warnings(
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
