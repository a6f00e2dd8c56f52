"""What of a model is trained, what that takes, and at which rates."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from d2kit.solver.lr_scheduler import LRMultiplier

__all__ = [
    "Memory",
    "ModuleParameters",
    "estimate_memory",
    "learning_rates",
    "parameters_by_module",
    "spark_line",
]

SPARKS = "▁▂▃▄▅▆▇█"


class ModuleParameters(NamedTuple):
    """Parameters of a part of a model.

    Args:
        name: of the part.
        trained: number of values that the optimizer may change.
        frozen: number of the others.
    """

    name: str
    trained: int
    frozen: int


class Memory(NamedTuple):
    """Bytes on the device of one process, activations left out.

    Args:
        weights: parameters and buffers.
        gradients: of the trained parameters.
        optimizer: its state; None: an optimizer that we do not know.
        average: the moving average of the weights.
        autocast: copies of the trained weights in half precision, which live from forward to
            backward.
        buckets: in which gradients travel between processes.
    """

    weights: int
    gradients: int
    optimizer: int | None
    average: int = 0
    autocast: int = 0
    buckets: int = 0

    def total(self) -> int:
        """Return the sum, without what is not known."""
        return sum(part or 0 for part in self)


def parameters_by_module(model: nn.Module) -> list[ModuleParameters]:
    """Count the parameters of the children; one that is frozen in part is opened up.

    Args:
        model: not wrapped; a parameter that is shared counts where it comes first.

    Returns:
        One entry for each part that has parameters, in the order of the model; the model's or an
        opened part's own parameters have a name that ends with ``(own)``.
    """
    seen: set[int] = set()
    rows: list[ModuleParameters] = []

    def count(parameters: Iterable[nn.Parameter]) -> tuple[int, int]:
        totals = [0, 0]
        for parameter in parameters:
            if id(parameter) not in seen:
                seen.add(id(parameter))
                totals[not parameter.requires_grad] += parameter.numel()
        return totals[0], totals[1]

    def add(name: str, parameters: Iterable[nn.Parameter]) -> None:
        trained, frozen = count(parameters)
        if trained or frozen:
            rows.append(ModuleParameters(name, trained, frozen))

    def open_up(name: str, module: nn.Module) -> None:
        add(f"{name} (own)".strip(), module.parameters(recurse=False))
        for key, child in module.named_children():
            inner = f"{name}.{key}" if name else key
            kinds = {p.requires_grad for p in child.parameters() if id(p) not in seen}
            if len(kinds) == 2 and next(child.children(), None) is not None:
                open_up(inner, child)
            else:
                add(inner, child.parameters())

    open_up("", model)
    return rows


def estimate_memory(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    average: bool = False,
    autocast: bool = False,
    processes: int = 1,
) -> Memory:
    """Add up what training holds besides activations.

    Gradients that are accumulated over the parts of a batch take no more than those of one part.

    Args:
        model: the model, not wrapped.
        average: whether a moving average of all weights and statistics is kept (SOLVER.EMA).
        autocast: whether the forward pass is in mixed precision, 2 bytes a value.
        processes: number of them; several have buckets.
        optimizer: of it; SGD keeps one value per trained one with momentum, Adam and AdamW two
            (three with ``amsgrad``).
    """
    tensors = [*model.parameters(), *model.buffers()]
    trained = [p for p in model.parameters() if p.requires_grad]
    state: int | None = 0
    for group in optimizer.param_groups:
        copies = _copies(optimizer, group)
        if copies is None or state is None:
            state = None
            break
        state += copies * _bytes(p for p in group["params"] if p.requires_grad)
    gradients = _bytes(trained)
    half = 2 * sum(p.numel() for p in trained if p.dtype == torch.float32) if autocast else 0
    kept = _bytes(model.state_dict().values()) if average else 0
    return Memory(_bytes(tensors), gradients, state, kept, half, gradients if processes > 1 else 0)


def _copies(optimizer: Optimizer, group: dict[str, object]) -> int | None:
    """Return how many values per parameter an optimizer keeps."""
    if isinstance(optimizer, torch.optim.SGD):
        return 1 if group["momentum"] else 0
    if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        return 3 if group["amsgrad"] else 2
    return None


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def learning_rates(scheduler: LRScheduler, iterations: Sequence[int]) -> list[float] | None:
    """Return the largest learning rate of all groups at some iterations.

    Args:
        scheduler: the real one; not changed.
        iterations: indices from 0.

    Returns:
        One rate for each; None for a schedule that is known only by running it.
    """
    if not isinstance(scheduler, LRMultiplier):
        return None
    base = max(float(rate) for rate in scheduler.base_lrs)
    return [base * scheduler._multiplier(i / scheduler._max_iter) for i in iterations]


def spark_line(values: Sequence[float]) -> str:
    """Draw values, 0 to the largest, one character each."""
    top = max(values, default=0.0)
    steps = len(SPARKS) - 1
    return "".join(SPARKS[round(steps * value / top) if top > 0 else 0] for value in values)
