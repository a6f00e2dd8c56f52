"""Communication between processes; everything works as a world of one where none was set up."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

__all__ = [
    "all_gather",
    "cpu_group",
    "create_local_process_group",
    "gather",
    "get_local_process_group",
    "get_local_rank",
    "get_local_size",
    "get_rank",
    "get_world_size",
    "is_main_process",
    "mean_over_ranks",
    "on_its_own",
    "reduce_dict",
    "shared_random_seed",
    "synchronize",
    "unwrap_model",
]

_ALONE: ContextVar[bool] = ContextVar("d2kit_process_on_its_own", default=False)
_LOCAL_PROCESS_GROUP: Any = None
_OBJECT_GROUP: tuple[Any, Any] | None = None  # (world group, gloo group made for it)


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_world_size() -> int:
    """Return the number of processes, 1 where torch.distributed is not set up."""
    if _ALONE.get():
        return 1
    return dist.get_world_size() if _initialised() else 1


@contextmanager
def on_its_own() -> Iterator[None]:
    """Let this process count as the only one, for work that the processes do not do in step.

    Inside, `get_world_size` is 1, and nothing is exchanged or waited for; the rank stays.
    """
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def get_rank() -> int:
    """Return the index of this process among all, in [0, world size)."""
    return dist.get_rank() if _initialised() else 0


def is_main_process() -> bool:
    """Tell whether this is the process with rank 0."""
    return get_rank() == 0


def create_local_process_group(num_workers_per_machine: int) -> None:
    """Make the group of processes on this machine; every process must call it once.

    Args:
        num_workers_per_machine: processes on each machine; must divide the world size.

    Raises:
        RuntimeError: if the group exists already.
        ValueError: if the world size is not a multiple of the argument.
    """
    global _LOCAL_PROCESS_GROUP  # noqa: PLW0603
    if _LOCAL_PROCESS_GROUP is not None:
        raise RuntimeError("create_local_process_group was called already in this process")
    world = get_world_size()
    if num_workers_per_machine < 1 or world % num_workers_per_machine:
        raise ValueError(
            f"expected a world size that is a multiple of num_workers_per_machine, "
            f"got {world} processes and {num_workers_per_machine} per machine"
        )
    for start in range(0, world, num_workers_per_machine):
        ranks = list(range(start, start + num_workers_per_machine))
        group = dist.new_group(ranks)
        if get_rank() in ranks:
            _LOCAL_PROCESS_GROUP = group


def get_local_process_group() -> dist.ProcessGroup:
    """Return the group of the processes on this machine, made by `create_local_process_group`.

    Raises:
        RuntimeError: if it was not made.
    """
    if _LOCAL_PROCESS_GROUP is None:
        raise RuntimeError(
            "there is no local process group: start with d2kit.engine.launch, or call "
            "d2kit.utils.comm.create_local_process_group after init_process_group"
        )
    group: dist.ProcessGroup = _LOCAL_PROCESS_GROUP
    return group


def get_local_rank() -> int:
    """Return the index of this process among those on its machine."""
    if not _initialised():
        return 0
    if _LOCAL_PROCESS_GROUP is None and "LOCAL_RANK" in os.environ:
        return int(os.environ["LOCAL_RANK"])
    return dist.get_rank(group=get_local_process_group())


def get_local_size() -> int:
    """Return the number of processes on this machine."""
    if not _initialised():
        return 1
    if _LOCAL_PROCESS_GROUP is None and "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["LOCAL_WORLD_SIZE"])
    return dist.get_world_size(group=get_local_process_group())


def synchronize() -> None:
    """Wait until every process has come here."""
    if get_world_size() == 1:
        return
    if dist.get_backend() == dist.Backend.NCCL:
        dist.barrier(device_ids=[torch.cuda.current_device()])
    else:
        dist.barrier()


def cpu_group() -> Any:
    """Return a group of all processes that can carry CPU tensors; all must call it together."""
    global _OBJECT_GROUP  # noqa: PLW0603
    world = dist.group.WORLD
    if dist.get_backend() != dist.Backend.NCCL:
        return world
    if _OBJECT_GROUP is None or _OBJECT_GROUP[0] is not world:
        _OBJECT_GROUP = (world, dist.new_group(backend="gloo"))
    return _OBJECT_GROUP[1]


def all_gather(data: object, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Collect one picklable object of every process in every process.

    Args:
        data: any picklable object.
        group: a gloo group; None means all processes.

    Returns:
        The objects, by rank in the group.
    """
    if get_world_size() == 1:
        return [data]
    group = cpu_group() if group is None else group
    size = dist.get_world_size(group)
    if size == 1:
        return [data]
    received: list[Any] = [None] * size
    dist.all_gather_object(received, data, group=group)
    return received


def gather(data: object, dst: int = 0, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Collect one picklable object of every process in process `dst`.

    Args:
        data: any picklable object.
        dst: global rank of the receiver.
        group: a gloo group; None means all processes.

    Returns:
        In `dst` the objects by rank in the group, elsewhere an empty list.
    """
    if get_world_size() == 1:
        return [data]
    group = cpu_group() if group is None else group
    size = dist.get_world_size(group)
    if size == 1:
        return [data]
    if get_rank() != dst:
        dist.gather_object(data, None, dst=dst, group=group)
        return []
    received: list[Any] = [None] * size
    dist.gather_object(data, received, dst=dst, group=group)
    return received


def shared_random_seed() -> int:
    """Return a random number in [0, 2**31) that is the same in all processes.

    It is drawn from numpy's global generator of rank 0; all processes must call this together.
    """
    return int(all_gather(np.random.randint(2**31))[0])


def reduce_dict(input_dict: Mapping[str, Tensor], average: bool = True) -> dict[str, Tensor]:
    """Sum or average scalar tensors over the processes, in one message.

    Args:
        input_dict: name -> scalar tensor; the same names in every process, one device.
        average: divide the sums by the number of processes.

    Returns:
        The reduced values, detached, in every process; the input itself for one process.
    """
    world = get_world_size()
    if world == 1 or not input_dict:
        return dict(input_dict)
    names = sorted(input_dict)
    values = torch.stack([input_dict[name].detach().float() for name in names])
    dist.all_reduce(values)
    if average:
        values /= world
    return dict(zip(names, values.unbind(), strict=True))


def mean_over_ranks(x: Tensor) -> Tensor:
    """Average a tensor over the processes, outside of autograd.

    Losses divide by such means of their counts, so that they do not depend on how a batch is split
    over processes.

    Args:
        x: any shape, the same in every process; integers become float32.

    Returns:
        The mean, detached, in every process; `x` detached for one process.
    """
    value = x.detach()
    if not value.is_floating_point():
        value = value.float()
    world = get_world_size()
    if world == 1:
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value / world


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the model inside what distributes it over devices or processes.

    Args:
        model: a model, or `DistributedDataParallel` or `DataParallel` of one.

    Returns:
        The model; `model` itself where nothing is around it.
    """
    if isinstance(model, (DistributedDataParallel, DataParallel)):
        inner: nn.Module = model.module
        return inner
    return model
