"""What this machine computes on, and how: devices, precisions, cores, memory, fixed shapes."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.fx
from torch import Tensor

__all__ = [
    "Constants",
    "available_cores",
    "choose_device",
    "choose_inference_dtype",
    "computes_bfloat16",
    "exact_dtype",
    "fixed_shapes",
    "note_exactness",
    "retry_if_cuda_oom",
    "shapes_are_fixed",
    "upload",
    "use_device",
]


logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")

_ALIASES = {"gpu": "cuda", "": "cpu"}


def choose_device(name: str | int | torch.device, source: str = "MODEL.DEVICE") -> torch.device:
    """Return the device of a name; the CPU, with a warning, where the machine has no such kind.

    Args:
        name: "cpu", "cuda", "cuda:1", "gpu", 1 or "1" (a CUDA device), "mps", "auto" (CUDA, MPS or
            the CPU, what there is), or a `torch.device`.
        source: where the name comes from, for messages.

    Raises:
        ValueError: if it is no device's name, or this machine has fewer devices of the kind.
    """
    text = str(name).strip().lower()
    if text == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    text = f"cuda:{text}" if text.isdigit() else _ALIASES.get(text, text)
    kind, _, number = text.partition(":")
    text = f"{_ALIASES.get(kind, kind)}:{number}" if number else text
    try:
        device = torch.device(text)
    except RuntimeError:
        raise ValueError(
            f"{source}: expected cpu, cuda, cuda:N, mps or auto, got {name!r}"
        ) from None
    available: dict[str, Callable[[], bool]] = {
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
    }
    if device.type in available and not available[device.type]():
        logger.warning(
            "%s is '%s', but this machine has no %s device: using the CPU. Set it to cpu to "
            "silence this.",
            source,
            name,
            device.type.upper(),
        )
        return torch.device("cpu")
    if device.type == "cuda" and device.index is not None:
        count = torch.cuda.device_count()
        if device.index >= count:
            raise ValueError(
                f"{source}: '{name}', but this machine has {count} CUDA "
                f"device{'s' * (count != 1)}: cuda:0 to cuda:{count - 1}"
            )
    return device


def computes_bfloat16(device: torch.device) -> bool:
    """Tell whether a device computes bfloat16 natively; elsewhere it is emulated, and slower."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return True
    # torch has no public question for the CPU's units; each of these is False where it is absent
    questions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    if any(getattr(torch.cpu, name, lambda: False)() for name in questions):
        return True
    if torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return False  # x86: the questions above are all there are
    arm = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return bool(arm()) if arm is not None else False


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_inference_dtype(
    name: str, device: torch.device, source: str = "TEST.DTYPE"
) -> torch.dtype:
    """Return the type that a model computes in at inference.

    Args:
        name: "float32", "bfloat16" or "float16".
        device: of the model.
        source: where the name comes from, for messages.

    Returns:
        float32, with a log line, where the device would emulate the other: that is slower and less
        exact. The CPU emulates float16.

    Raises:
        ValueError: for another name.
    """
    if name not in _DTYPES:
        raise ValueError(f"{source}: expected one of {', '.join(_DTYPES)}, got {name!r}")
    dtype = _DTYPES[name]
    if dtype is torch.float32:
        return dtype
    native = device.type != "cpu" if dtype is torch.float16 else computes_bfloat16(device)
    if native:
        return dtype
    logger.warning(
        "%s: this %s does not compute %s natively, which would be slower: float32",
        source,
        device.type.upper(),
        name,
    )
    return torch.float32


def exact_dtype(device: torch.device) -> torch.dtype:
    """Return the widest floating type of a device: float64, but float32 on MPS, which has no other.

    Args:
        device: where the numbers are.
    """
    return torch.float32 if device.type == "mps" else torch.float64


def use_device(device: torch.device) -> None:
    """Make the CUDA device of a process's model its current one.

    What names no device (events, memory figures, generated kernels) then means the model's, also
    where that is ``cuda:1``. Other devices have no such state.

    Args:
        device: of the model; ``cuda`` without a number leaves the current one.
    """
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on a device; to CUDA by pinned memory, so that the host does not wait.

    Args:
        tensor: on any device.
        device: where it is wanted.
    """
    plain = tensor.device.type == "cpu" and not tensor.requires_grad
    if device.type == "cuda" and plain and tensor.numel():
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def available_cores() -> int:
    """Return how many cores this process may use: affinity, and the limit of its container."""
    allowed = getattr(os, "sched_getaffinity", None)
    cores = len(allowed(0)) if allowed else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, -(-int(quota) // int(period))))
    except (OSError, ValueError):  # no such limit ("max"), or another system
        return cores


def is_fx_tracing() -> bool:
    """Tell whether torch.fx symbolically traces the calling code."""
    return bool(torch.fx._symbolic_trace.is_fx_symbolic_tracing())


def is_symbolic() -> bool:
    """Tell whether torch.jit.trace, torch.compile or torch.export records the calling code.

    Sizes are then tensors or symbols: code that turns one into a Python number, or asks how many
    rows there are, would make that number of one picture a constant for all.
    """
    return torch.jit.is_tracing() or torch.compiler.is_compiling()


class Constants(dict[Hashable, Any]):
    """Small tensors that a module makes once for each question, as a look at the device costs.

    They go with the module, and are no part of its state.
    """

    _MOST = 64

    def kept(self, question: Hashable, make: Callable[[], _Result]) -> _Result:
        """Return what `make` returned for this question before, or does now.

        Args:
            question: all that the result depends on, the device too.
            make: without arguments, returns tensors.
        """
        if is_symbolic():
            return make()
        if question not in self:
            if len(self) >= self._MOST:
                self.clear()
            with torch.inference_mode(mode=False), torch.no_grad():  # training may use them later
                self[question] = make()
        found: _Result = self[question]
        return found


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


@contextmanager
def _ignore_torch_cuda_oom() -> Iterator[None]:
    """Swallow the error of a GPU out of memory; pass all others on."""
    try:
        yield
    except RuntimeError as error:
        by_type = isinstance(error, torch.cuda.OutOfMemoryError)
        if not by_type and "CUDA out of memory" not in str(error):
            raise


def _on_cpu(value: object) -> object:
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
    def wrapper(*args: object, **kwargs: object) -> _Result:
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


_EXACT: ContextVar[list[Tensor] | None] = ContextVar("exact", default=None)


@contextmanager
def fixed_shapes() -> Iterator[list[Tensor]]:
    """Let the steps of a detector give padded results of sizes that do not depend on the image.

    Yields:
        One bool tensor for each step, there at the end: whether it gave all that it gives without
        padding. Where one is False, the results are not to be used.
    """
    exact: list[Tensor] = []
    token = _EXACT.set(exact)
    try:
        yield exact
    finally:
        _EXACT.reset(token)


def shapes_are_fixed() -> bool:
    """Tell whether the calling code is inside `fixed_shapes`."""
    return _EXACT.get() is not None


def note_exactness(exact: Tensor) -> None:
    """Say, inside `fixed_shapes`, whether a step gave all results, by a 0-dim bool tensor."""
    noted = _EXACT.get()
    if noted is not None:
        noted.append(exact)
