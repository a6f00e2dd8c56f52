"""Parts of a batch, for gradients that are accumulated over them."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["check_accumulation", "mean_losses", "split_batch", "without_sync"]


def check_accumulation(images: int, processes: int, steps: int) -> None:
    """Make sure that a batch can be divided among processes and parts.

    Args:
        images: SOLVER.IMS_PER_BATCH.
        processes: number of processes.
        steps: SOLVER.ACCUMULATE_STEPS.

    Raises:
        ValueError: if it cannot.
    """
    if steps < 1 or images % (processes * steps):
        raise ValueError(
            f"SOLVER.ACCUMULATE_STEPS is {steps}: expected a number of equal parts of the "
            f"SOLVER.IMS_PER_BATCH {images} images of an iteration in {processes} process(es), "
            "each part with at least one image per process"
        )


def split_batch(batch: Any, steps: int) -> list[Any]:
    """Cut a batch into `steps` parts of equal length, in order.

    Raises:
        ValueError: if it is no sequence, or its length is not a multiple.
    """
    if steps == 1:
        return [batch]
    if not isinstance(batch, Sequence) or not batch or len(batch) % steps:
        found = f"{len(batch)} entries" if isinstance(batch, Sequence) else type(batch).__name__
        raise ValueError(
            f"accumulate_steps is {steps}: expected batches that are lists whose length is a "
            f"multiple of it, got {found}"
        )
    size = len(batch) // steps
    return [batch[start : start + size] for start in range(0, len(batch), size)]


def mean_losses(parts: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """Return the mean of each loss over the parts of a batch.

    Raises:
        ValueError: if the parts have different losses.
    """
    if len(parts) == 1:
        return parts[0]
    names = set(parts[0])
    for part in parts[1:]:
        if set(part) != names:
            raise ValueError(
                "the parts of a batch must return the same losses (accumulate_steps), got "
                f"{sorted(names)} and {sorted(part)}"
            )
    return {
        name: torch.stack([torch.as_tensor(part[name]).detach() for part in parts]).mean(0)
        for name in parts[0]
    }


def without_sync(model: nn.Module, *, last: bool) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which the processes exchange gradients after the last part only."""
    if last or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()
