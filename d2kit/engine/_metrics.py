"""The losses of a step: averaged over the processes in one message, checked, written."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from d2kit.engine._failure import NonFiniteLossError, StepOfRank
from d2kit.utils import comm
from d2kit.utils.events import get_event_storage

__all__ = ["StepMetrics", "image_ids", "non_finite_error", "put_metrics"]


@dataclass
class StepMetrics:
    """The losses of one step on their way to the host.

    Args:
        names: names of the losses.
        values: (L + W,) sums over the processes of L losses, then the data time of each process.
        local: (L,) the losses of this process.
        iteration: of the step.
        images: ids of this process's images.
    """

    names: list[str]
    values: Tensor
    local: Tensor
    iteration: int
    images: list[Any] = field(default_factory=list)
    copied: Any = None  # CUDA event after the copy to the host

    @classmethod
    def start(
        cls,
        loss_dict: Mapping[str, Tensor | float],
        data_time: float,
        iteration: int,
        images: Sequence[Any] = (),
    ) -> "StepMetrics":
        """Queue the reduction and the copy to the host, without waiting for them."""
        names = sorted(loss_dict)
        world, rank = comm.get_world_size(), comm.get_rank()
        losses = [torch.as_tensor(loss_dict[name]).detach().float().reshape(()) for name in names]
        device = next((x.device for x in losses if x.device.type != "cpu"), torch.device("cpu"))
        local = torch.stack([x.to(device) for x in losses])
        times = torch.zeros(world)
        times[rank] = data_time
        values = torch.cat([local, times.to(device, non_blocking=True)])
        if world > 1:
            dist.all_reduce(values)
        metrics = cls(names, values, local, iteration, list(images))
        if device.type == "cuda":
            metrics.values = values.to("cpu", non_blocking=True)
            metrics.copied = torch.cuda.Event()
            metrics.copied.record()
        return metrics

    def fetch(self) -> tuple[dict[str, float], float]:
        """Wait for the values.

        Returns:
            The mean of each loss over the processes, and the longest data time in seconds.
        """
        if self.copied is not None:
            self.copied.synchronize()
        numbers = self.values.tolist()
        count, world = len(self.names), comm.get_world_size()
        losses = {name: x / world for name, x in zip(self.names, numbers[:count], strict=True)}
        return losses, max(numbers[count:])


def put_metrics(
    losses: Mapping[str, float], data_time: float, iteration: int, prefix: str = ""
) -> None:
    """Put reduced losses and their sum into the current storage, on rank 0."""
    if not comm.is_main_process():
        return
    storage = get_event_storage()
    storage.put_scalar("data_time", data_time, cur_iter=iteration)
    storage.put_scalar(f"{prefix}total_loss", sum(losses.values()), cur_iter=iteration)
    if len(losses) > 1:
        for name, value in losses.items():
            storage.put_scalar(name, value, cur_iter=iteration)


def image_ids(data: Any) -> list[Any]:
    """Return the ids (or file names) of the images of a batch, as far as it tells them."""
    if not isinstance(data, (list, tuple)):
        return []
    return [
        sample.get("image_id", sample.get("file_name"))
        for sample in data
        if isinstance(sample, Mapping)
    ]


def non_finite_error(metrics: StepMetrics, *, updated: bool) -> NonFiniteLossError:
    """Return an error that names losses and images; all processes must call this together."""
    own = (metrics.images, dict(zip(metrics.names, metrics.local.tolist(), strict=True)))
    lines = [f"the loss is not finite at iteration {metrics.iteration}:"]
    gathered = comm.all_gather(own)
    for rank, (images, losses) in enumerate(gathered):
        bad = [name for name, x in losses.items() if not math.isfinite(x)]
        values = ", ".join(f"{name}={x:.6g}" for name, x in losses.items())
        mark = f" <- {', '.join(bad)}" if bad else ""
        lines.append(f"  rank {rank}, images {images}: {values}{mark}")
    lines.append(
        "the step before the check has changed the weights: resume from the last checkpoint"
        if updated
        else "the weights are those before this step"
    )
    lines.append(
        "usual causes: a learning rate that is too high, boxes without area, fp16 overflow"
    )
    ranks = [StepOfRank(images, losses) for images, losses in gathered]
    return NonFiniteLossError("\n".join(lines), metrics.iteration, ranks, updated=updated)
