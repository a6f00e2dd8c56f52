"""Retrying after the GPU ran out of memory."""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

__all__ = ["retry_if_cuda_oom"]

_Result = TypeVar("_Result")


@contextmanager
def _ignore_torch_cuda_oom() -> Iterator[None]:
    """Swallow the error of a GPU out of memory; pass all others on."""
    try:
        yield
    except RuntimeError as error:
        by_type = isinstance(error, torch.cuda.OutOfMemoryError)
        if not by_type and "CUDA out of memory" not in str(error):
            raise


def _on_cpu(value: Any) -> Any:
    device = getattr(value, "device", None)
    if getattr(device, "type", None) == "cuda" and hasattr(value, "to"):
        return value.to(device="cpu")
    return value


def retry_if_cuda_oom(func: Callable[..., _Result]) -> Callable[..., _Result]:
    """Make a function survive a GPU that runs out of memory.

    After the error the function is called again with torch's cache emptied, and if that fails too,
    with the arguments that have a CUDA ``device`` moved to the CPU; the result then is on the CPU.

    Args:
        func: free of side effects, and able to run on both devices.

    Returns:
        The wrapped function.
    """

    @functools.wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> _Result:
        for attempt in (1, 2):
            if attempt == 2:
                torch.cuda.empty_cache()
            with _ignore_torch_cuda_oom():
                return func(*args, **kwargs)
        logging.getLogger(__name__).info("Out of GPU memory: running %s on the CPU", func)
        return func(
            *(_on_cpu(value) for value in args),
            **{name: _on_cpu(value) for name, value in kwargs.items()},
        )

    return wrapper
