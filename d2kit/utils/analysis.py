"""Counts of operations, activations and parameters of models that take `list[dict]` inputs.

Only `d2kit analyze` imports this module, because fvcore.nn is slow to import.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fvcore.nn
import torch
from fvcore.nn import ActivationCountAnalysis, parameter_count, parameter_count_table
from torch import Tensor, nn

__all__ = [
    "FlopCountAnalysis",
    "activation_count_operators",
    "find_unused_parameters",
    "flop_count_operators",
    "parameter_count",
    "parameter_count_table",
]


def __getattr__(name: str) -> Any:
    """Forward `TracingAdapter`, which user code imports from here."""
    if name == "TracingAdapter":
        from d2kit.export import TracingAdapter

        return TracingAdapter
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested outputs; of `Instances` and boxes, their fields."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "get_fields"):
        yield from _tensors(value.get_fields())
    elif isinstance(getattr(value, "tensor", None), Tensor):
        yield value.tensor


class _Traceable(nn.Module):
    """Tensors in, tensors out, around a detection model or any other."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        super().__init__()
        self.model = model
        samples = inputs[0] if isinstance(inputs, tuple) and len(inputs) == 1 else inputs
        is_batch = isinstance(samples, list) and bool(samples) and isinstance(samples[0], dict)
        self._samples: list[dict[str, Any]] | None = samples if is_batch else None
        if is_batch:
            self.flat_inputs = tuple(sample["image"] for sample in samples)
        else:
            self.flat_inputs = tuple(inputs) if isinstance(inputs, (list, tuple)) else (inputs,)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        if self._samples is None:
            return tuple(_tensors(self.model(*tensors)))
        batch = [{**s, "image": t} for s, t in zip(self._samples, tensors, strict=True)]
        return tuple(_tensors(self.model(batch)))


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode inside the block, and each module back into its mode after it."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


def find_unused_parameters(model: nn.Module, inputs: object) -> list[str]:
    """Return the names of the parameters that get no gradient from the losses of one batch.

    Args:
        model: a model that gives a loss or a dict of losses in training mode.
        inputs: a batch `list[dict]`, or the positional arguments as a tuple.
    """
    before = {module: module.training for module in model.modules()}
    model.train()
    for parameter in model.parameters():
        parameter.grad = None
    try:
        output = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
        torch.stack([loss.float().sum() for loss in _tensors(output)]).sum().backward()
        names = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    finally:
        for module, training in before.items():
            module.training = training
        for parameter in model.parameters():
            parameter.grad = None
    return names


def _silence(analysis: Any) -> None:
    """Turn off warnings that say nothing about a count.

    Elementwise operators and indexing have no multiply-adds, and which levels of a pyramid are
    called depends on the boxes.
    """
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.tracer_warnings("none")


class FlopCountAnalysis(fvcore.nn.FlopCountAnalysis):
    """fvcore's count of multiply-adds, also for models that take `list[dict]`.

    Args:
        model: in eval mode for detection models.
        inputs: what the model is called with: a batch `list[dict]`, a tensor or a tuple of them.
    """

    def __init__(self, model: nn.Module, inputs: object) -> None:
        wrapper = _Traceable(model, inputs)
        super().__init__(wrapper, wrapper.flat_inputs)
        _silence(self)


def flop_count_operators(model: nn.Module, inputs: list[Any]) -> defaultdict[str, float]:
    """Count multiply-adds by operator.

    Args:
        model: in eval mode for detection models.
        inputs: a batch `list[dict]`, or the positional arguments.

    Returns:
        Operator -> 10**9 multiply-adds.
    """
    with _evaluated(model), torch.no_grad():
        counts = FlopCountAnalysis(model, inputs).by_operator()
    return defaultdict(float, {name: count / 1e9 for name, count in counts.items()})


def activation_count_operators(
    model: nn.Module, inputs: list[Any], **kwargs: Any
) -> defaultdict[str, float]:
    """Count the output elements of convolutions and matrix products by operator.

    Args:
        model: in eval mode for detection models.
        inputs: a batch `list[dict]`, or the positional arguments.
        kwargs: `supported_ops`: operator -> how to count its outputs, beside fvcore's.

    Returns:
        Operator -> 10**6 elements.
    """
    wrapper = _Traceable(model, inputs)
    analysis = ActivationCountAnalysis(wrapper, wrapper.flat_inputs)
    analysis.set_op_handle(**(kwargs.get("supported_ops") or {}))
    _silence(analysis)
    with _evaluated(model), torch.no_grad():
        counts = analysis.by_operator()
    return defaultdict(float, {name: count / 1e6 for name, count in counts.items()})
