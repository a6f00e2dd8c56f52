"""What kind of tracing the code runs under."""

from typing import Any

import torch
import torch.fx
from torch import Tensor

__all__ = ["is_fx_tracing", "is_symbolic", "largest", "smallest", "stacked_sizes"]


def is_fx_tracing() -> bool:
    """Tell whether torch.fx symbolically traces the calling code."""
    return bool(torch.fx._symbolic_trace.is_fx_symbolic_tracing())


def is_symbolic() -> bool:
    """Tell whether torch.jit.trace, torch.compile or torch.export records the calling code.

    Sizes are then tensors or symbols: code that turns one into a Python number, or asks how many
    rows there are, would make that number of one picture a constant for all.
    """
    return torch.jit.is_tracing() or torch.compiler.is_compiling()


def smallest(limit: int, size: Any) -> Any:
    """Return the smaller of `limit` and a size, which may be recorded, without fixing it."""
    if isinstance(size, Tensor):
        return size.clamp(max=limit)
    return torch.sym_min(limit, size)


def largest(*sizes: Any) -> Any:
    """Return the largest of sizes, any of which may be recorded, without fixing it."""
    if any(isinstance(size, Tensor) for size in sizes):
        return torch.stack([torch.as_tensor(size) for size in sizes]).max()
    top = sizes[0]
    for size in sizes[1:]:
        top = torch.sym_max(top, size)
    return top


def stacked_sizes(sizes: Any) -> Tensor:
    """Return sizes, numbers or recorded ones, as one int64 tensor that still depends on them."""
    return torch.stack([torch.as_tensor(size, dtype=torch.int64) for size in sizes])
