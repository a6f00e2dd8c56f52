"""Assertions for tests of models."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["assert_instances_allclose"]


def assert_instances_allclose(
    input: Any,  # noqa: A002 the documented name
    other: Any,
    *,
    rtol: float = 1e-5,
    msg: str = "",
    size_as_tensor: bool = False,
) -> None:
    """Raise AssertionError unless two `Instances` agree in size, fields and nearly in values.

    Tensors and box-like fields (with a ``tensor``) are compared relative to their largest absolute
    value, others with ``==``.

    Args:
        input: an `Instances`.
        other: what it should be.
        rtol: allowed difference over the field's largest absolute value.
        msg: put before the message.
        size_as_tensor: the image sizes are tensors.
    """
    prefix = f"{msg} " if msg else ""
    sizes = input.image_size, other.image_size
    if size_as_tensor:
        same = torch.equal(torch.as_tensor(sizes[0]), torch.as_tensor(sizes[1]))
    else:
        same = sizes[0] == sizes[1]
    if not same:
        raise AssertionError(f"{prefix}image sizes differ: {sizes[0]} and {sizes[1]}")
    ours, theirs = input.get_fields(), other.get_fields()
    if set(ours) != set(theirs):
        raise AssertionError(f"{prefix}fields differ: {sorted(ours)} and {sorted(theirs)}")
    for name, value in ours.items():
        _assert_field(name, value, theirs[name], rtol, prefix)


def _assert_field(name: str, value: Any, expected: Any, rtol: float, prefix: str) -> None:
    if not isinstance(value, Tensor) and isinstance(getattr(value, "tensor", None), Tensor):
        value, expected = value.tensor, expected.tensor
    if not isinstance(value, Tensor):
        if value != expected:
            raise AssertionError(f"{prefix}field '{name}' differs: {value!r} and {expected!r}")
        return
    if value.shape != expected.shape:
        shapes = f"{tuple(value.shape)} and {tuple(expected.shape)}"
        raise AssertionError(f"{prefix}field '{name}' differs in shape: {shapes}")
    if value.numel() == 0:
        return
    a, b = value.detach().double().cpu(), expected.detach().double().cpu()
    limit = rtol * float(b.abs().max())
    worst = float((a - b).abs().max())
    if not worst <= limit:
        raise AssertionError(f"{prefix}field '{name}' differs by {worst:g}, allowed {limit:g}")
