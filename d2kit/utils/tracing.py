"""What kind of tracing the code runs under."""

import torch.fx

__all__ = ["is_fx_tracing"]


def is_fx_tracing() -> bool:
    """Tell whether torch.fx symbolically traces the calling code."""
    return bool(torch.fx._symbolic_trace.is_fx_symbolic_tracing())
