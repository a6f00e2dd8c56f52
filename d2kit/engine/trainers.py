"""`SimpleTrainer` and `AMPTrainer`: what one iteration is."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from d2kit.engine.safety.failure import NonFiniteLossError, StepOfRank
from d2kit.engine.trainer_base import TrainerBase
from d2kit.utils import comm
from d2kit.utils.events import get_event_storage
from d2kit.utils.stopping import wait


def check_accumulation(images: int, processes: int, steps: int) -> None:
    """Make sure that a batch can be divided among processes and parts.

    Args:
        images: SOLVER.IMS_PER_BATCH.
        processes: number of processes.
        steps: SOLVER.ACCUMULATE_STEPS.

    Raises:
        ValueError: if it cannot.
    """
    if steps < 1 or images % (processes * steps):
        raise ValueError(
            f"SOLVER.ACCUMULATE_STEPS is {steps}: expected a number of equal parts of the "
            f"SOLVER.IMS_PER_BATCH {images} images of an iteration in {processes} process(es), "
            "each part with at least one image per process"
        )


def split_batch(batch: object, steps: int) -> list[Any]:
    """Cut a batch into `steps` parts of equal length, in order.

    Raises:
        ValueError: if it is no sequence, or its length is not a multiple.
    """
    if steps == 1:
        return [batch]
    if not isinstance(batch, Sequence) or not batch or len(batch) % steps:
        found = f"{len(batch)} entries" if isinstance(batch, Sequence) else type(batch).__name__
        raise ValueError(
            f"accumulate_steps is {steps}: expected batches that are lists whose length is a "
            f"multiple of it, got {found}"
        )
    size = len(batch) // steps
    return [batch[start : start + size] for start in range(0, len(batch), size)]


def mean_losses(parts: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """Return the mean of each loss over the parts of a batch.

    Raises:
        ValueError: if the parts have different losses.
    """
    if len(parts) == 1:
        return parts[0]
    names = set(parts[0])
    for part in parts[1:]:
        if set(part) != names:
            raise ValueError(
                "the parts of a batch must return the same losses (accumulate_steps), got "
                f"{sorted(names)} and {sorted(part)}"
            )
    return {
        name: torch.stack([torch.as_tensor(part[name]).detach() for part in parts]).mean(0)
        for name in parts[0]
    }


def without_sync(model: nn.Module, *, last: bool) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which the processes exchange gradients after the last part only."""
    if last or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()


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
    ) -> StepMetrics:
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
            metrics.copied.record(torch.cuda.current_stream(device))  # of the losses' device
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


def image_ids(data: object) -> list[Any]:
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


class SimpleTrainer(TrainerBase):
    """One optimizer, one loader, one dict of losses per iteration.

    Args:
        model: takes a batch, returns a loss or a dict of losses to be summed.
        data_loader: infinite iterable of batches.
        optimizer: of the model.
        gather_metric_period: write the losses every so many iterations (they are checked in each).
        zero_grad_before_forward: clear the gradients before the forward pass, not after it.
        async_write_metrics: look at the losses one iteration later, so that the host never waits
            for the device; a NaN is then seen one iteration late.
        accumulate_steps: cut each batch, a list, into so many equal parts, whose gradients are
            averaged before the one update: the memory of a part, the step of the whole batch.

    Raises:
        ValueError: if `accumulate_steps` is below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[Any] | None,
        optimizer: Optimizer,
        gather_metric_period: int = 1,
        zero_grad_before_forward: bool = False,
        async_write_metrics: bool = False,
        accumulate_steps: int = 1,
    ) -> None:
        super().__init__()
        if accumulate_steps < 1:
            raise ValueError(f"accumulate_steps must be at least 1, got {accumulate_steps}")
        model.train()
        self.model = model
        self.data_loader = data_loader
        self._data_loader_iter_obj: Iterator[Any] | None = None
        self.optimizer = optimizer
        self.gather_metric_period = gather_metric_period
        self.zero_grad_before_forward = zero_grad_before_forward
        self.async_write_metrics = async_write_metrics
        self.accumulate_steps = accumulate_steps
        self._waiting: StepMetrics | None = None
        self._names_agree = False
        self._images: list[Any] = []

    # ---- one iteration

    def run_step(self) -> None:
        """Do one iteration: batch, losses, gradients, check, update."""
        if not self.model.training:
            raise ValueError(
                f"{type(self).__name__}: the model is in eval mode; a hook must put it back into "
                "train mode"
            )
        start = time.perf_counter()
        data = self._next_batch()
        data_time = time.perf_counter() - start
        self._images = image_ids(data)
        if self.zero_grad_before_forward:
            self.optimizer.zero_grad()
        losses = self._gradients(split_batch(data, self.accumulate_steps))
        self.after_backward()
        self._write_metrics(losses, data_time)
        self._update()

    def _gradients(self, parts: list[Any]) -> Mapping[str, Tensor]:
        """Leave the mean gradient of the parts of a batch, and return their mean losses."""
        found: list[Mapping[str, Tensor]] = []
        for index, part in enumerate(parts):
            with without_sync(self.model, last=index == len(parts) - 1):
                with self._forward_context():
                    losses = self.model(part)
                loss_dict = {"total_loss": losses} if isinstance(losses, Tensor) else losses
                total = sum(loss_dict.values())
                if index == 0 and not self.zero_grad_before_forward:
                    self.optimizer.zero_grad()
                self._backward(total if len(parts) == 1 else total / len(parts))
            found.append(loss_dict)
        return mean_losses(found)

    def _forward_context(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def _backward(self, loss: Any) -> None:
        loss.backward()

    def _update(self) -> None:
        self.optimizer.step()

    # ---- data

    @property
    def _data_loader_iter(self) -> Iterator[Any]:
        """The iterator over the loader, made when it is first needed."""
        if self._data_loader_iter_obj is None:
            if self.data_loader is None:
                raise ValueError(f"{type(self).__name__} has no data_loader")
            self._data_loader_iter_obj = iter(self.data_loader)
        return self._data_loader_iter_obj

    def _next_batch(self) -> Any:
        try:
            with wait():
                return next(self._data_loader_iter)
        except StopIteration:
            raise ValueError(
                f"the training loader ended at iteration {self.iter} of {self.max_iter}; it must "
                "be infinite (use a TrainingSampler)"
            ) from None

    def reset_data_loader(self, data_loader_builder: Callable[[], Iterable[Any]]) -> None:
        """Replace the loader; the old one is deleted before the new one is built.

        Args:
            data_loader_builder: returns the new loader.
        """
        self._data_loader_iter_obj = None
        self.data_loader = None
        self.data_loader = data_loader_builder()

    # ---- metrics

    def _write_metrics(
        self,
        loss_dict: Mapping[str, Tensor],
        data_time: float,
        prefix: str = "",
        iter: int | None = None,
    ) -> None:
        """Check the losses of an iteration on all processes, and write them if it is time."""
        if not self._names_agree:
            _check_names(loss_dict)
            self._names_agree = True
        iteration = self.iter if iter is None else iter
        metrics = StepMetrics.start(loss_dict, data_time, iteration, self._images)
        if self.async_write_metrics:
            self.flush_metrics(prefix)
            self._waiting = metrics
        else:
            self._finish(metrics, prefix, updated=False)

    def _finish(self, metrics: StepMetrics, prefix: str, *, updated: bool) -> None:
        losses, data_time = metrics.fetch()
        if not math.isfinite(sum(losses.values())):
            raise non_finite_error(metrics, updated=updated)
        if (metrics.iteration + 1) % self.gather_metric_period == 0:
            put_metrics(losses, data_time, metrics.iteration, prefix)

    def flush_metrics(self, prefix: str = "") -> None:
        """Look at losses that wait since the last iteration (`async_write_metrics`)."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            self._finish(waiting, prefix, updated=True)

    @staticmethod
    def write_metrics(
        loss_dict: Mapping[str, Tensor], data_time: float, cur_iter: int, prefix: str = ""
    ) -> None:
        """Average losses over the processes and put them and their sum into the storage.

        Args:
            loss_dict: scalar losses; the same names in every process.
            data_time: seconds that this process waited for data.
            cur_iter: the iteration they belong to.
            prefix: put before ``total_loss``.

        Raises:
            FloatingPointError: on all processes, if a loss is not finite on any.
        """
        metrics = StepMetrics.start(loss_dict, data_time, cur_iter)
        losses, data_time = metrics.fetch()
        if not math.isfinite(sum(losses.values())):
            raise non_finite_error(metrics, updated=False)
        put_metrics(losses, data_time, cur_iter, prefix)

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the trainer, of the optimizer, and of modules beside their weights.

        A module that has `training_state` and `load_training_state` keeps with them what is no
        weight but decides the training, such as a running average.

        Raises:
            FloatingPointError: if the losses of the last iteration turn out not to be finite, so
                that no checkpoint is made of spoilt weights.
        """
        self.flush_metrics()
        state = {**super().state_dict(), "optimizer": self.optimizer.state_dict()}
        modules = {name: module.training_state() for name, module in self._modules_with_state()}
        return {**state, "modules": modules} if modules else state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state_dict)
        self.optimizer.load_state_dict(state_dict["optimizer"])
        states = state_dict.get("modules", {})
        for name, module in self._modules_with_state():
            if name in states:
                module.load_training_state(states[name])

    def _modules_with_state(self) -> list[tuple[str, Any]]:
        """Return the modules that keep more than weights, with their names."""
        model = comm.unwrap_model(self.model)
        return [(k, m) for k, m in model.named_modules() if hasattr(m, "training_state")]

    def after_train(self) -> None:
        """Write what waits, call the hooks, let go of the loader's workers."""
        if self.iter >= self.max_iter:  # after a failure the other processes may be elsewhere
            self.flush_metrics()
        self._data_loader_iter_obj = None
        super().after_train()


def _check_names(loss_dict: Mapping[str, Any]) -> None:
    """Make sure that the losses of all processes can be added up."""
    names = comm.all_gather(sorted(loss_dict))
    if any(other != names[0] for other in names):
        table = "; ".join(f"rank {rank}: {other}" for rank, other in enumerate(names))
        raise ValueError(f"the processes must return the same losses, got {table}")


def amp_precision(name: str) -> torch.dtype:
    """Return the type that SOLVER.AMP.PRECISION names.

    Raises:
        ValueError: if it is neither float16 nor bfloat16.
    """
    precisions = {"float16": torch.float16, "bfloat16": torch.bfloat16}
    if name not in precisions:
        raise ValueError(f"SOLVER.AMP.PRECISION: expected {' or '.join(precisions)}, got '{name}'")
    return precisions[name]


class AMPTrainer(SimpleTrainer):
    """`SimpleTrainer` with automatic mixed precision.

    Args:
        model: as in `SimpleTrainer`.
        data_loader: as in `SimpleTrainer`.
        optimizer: as in `SimpleTrainer`.
        gather_metric_period: as in `SimpleTrainer`.
        zero_grad_before_forward: as in `SimpleTrainer`.
        grad_scaler: scales the loss; None makes one for float16 and none for bfloat16, which has
            the range of float32.
        precision: type of the autocast forward pass, float16 or bfloat16.
        log_grad_scaler: write the scale as a metric.
        async_write_metrics: as in `SimpleTrainer`.
        accumulate_steps: as in `SimpleTrainer`.

    Raises:
        ValueError: if the model is on several devices of this process.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[Any] | None,
        optimizer: Optimizer,
        gather_metric_period: int = 1,
        zero_grad_before_forward: bool = False,
        grad_scaler: torch.amp.GradScaler | None = None,
        precision: torch.dtype = torch.float16,
        log_grad_scaler: bool = False,
        async_write_metrics: bool = False,
        accumulate_steps: int = 1,
    ) -> None:
        several = isinstance(model, DistributedDataParallel) and len(model.device_ids or []) > 1
        if several or isinstance(model, DataParallel):
            raise ValueError("AMPTrainer needs one device per process; use DistributedDataParallel")
        super().__init__(
            model,
            data_loader,
            optimizer,
            gather_metric_period,
            zero_grad_before_forward,
            async_write_metrics,
            accumulate_steps,
        )
        self.device_type = next(model.parameters()).device.type
        if grad_scaler is None:
            grad_scaler = torch.amp.GradScaler(self.device_type, enabled=precision is torch.float16)
        self.grad_scaler = grad_scaler
        self.precision = precision
        self.log_grad_scaler = log_grad_scaler

    def _forward_context(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device_type, dtype=self.precision)

    def _backward(self, loss: Any) -> None:
        self.grad_scaler.scale(loss).backward()
        if self.log_grad_scaler and comm.is_main_process():
            scale = self.grad_scaler.get_scale()
            get_event_storage().put_scalar("[metric]grad_scaler", scale)

    def _update(self) -> None:
        # Unscaled first: gradient clipping happens inside the optimizer and must see true values.
        self.grad_scaler.unscale_(self.optimizer)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of `SimpleTrainer` and of the scaler."""
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state_dict)
        if state_dict.get("grad_scaler"):
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
