"""Rows of equal layers in the heads, under the numbered names of the published weights."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from d2kit.layers import Conv2d, get_norm
from d2kit.layers._weight_init import msra_fill, xavier_fill


def add_convs(
    head: nn.Module,
    prefix: str,
    channels: int,
    dims: Sequence[int],
    norm: str | Callable[[int], nn.Module] | None = "",
) -> list[str]:
    """Give `head` 3x3 convolutions ``<prefix>1``, ``<prefix>2``, ..., each with a ReLU.

    Args:
        head: the module that gets them.
        prefix: first part of their names.
        channels: of the input of the first.
        dims: output channels of each.
        norm: after each, as of `get_norm`.

    Returns:
        Their names.
    """
    names: list[str] = []
    for before, after in zip([channels, *dims], dims, strict=False):
        conv = Conv2d(
            before,
            after,
            kernel_size=3,
            padding=1,
            bias=not norm,
            norm=get_norm(norm, after),
            activation=nn.ReLU(),
        )
        msra_fill(conv)
        names.append(_added(head, prefix, len(names), conv))
    return names


def add_fcs(head: nn.Module, size: int, dims: Sequence[int]) -> list[str]:
    """Give `head` linear layers ``fc1``, ``fc2``, ... from `size` on; return their names."""
    names: list[str] = []
    for before, after in zip([size, *dims], dims, strict=False):
        layer = nn.Linear(before, after)
        xavier_fill(layer)
        names.append(_added(head, "fc", len(names), layer))
    return names


def _added(head: nn.Module, prefix: str, index: int, layer: nn.Module) -> str:
    name = f"{prefix}{index + 1}"
    head.add_module(name, layer)
    return name


def in_turn(head: nn.Module, names: Iterable[str], x: Any) -> Tensor:
    """Apply the layers of `head` that have these names, one after the other."""
    for name in names:
        x = getattr(head, name)(x)
    return x


def own_class(logits: Tensor, classes: Tensor) -> Tensor:
    """Pick the logits of each region's class.

    Args:
        logits: (R, K, ...), or (R, 1, ...) where they do not depend on the class.
        classes: (R,) int64.

    Returns:
        (R, 1, ...).
    """
    if logits.shape[1] == 1:
        return logits
    return logits[torch.arange(len(logits), device=logits.device), classes].unsqueeze(1)
