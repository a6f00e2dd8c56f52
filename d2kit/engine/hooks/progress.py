"""Hooks for callbacks, timing, writing, the learning rate and profiles."""

from __future__ import annotations

import datetime
import logging
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from fvcore.common.param_scheduler import ParamScheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler as TorchScheduler

from d2kit.engine.trainer_base import HookBase, TrainerBase
from d2kit.solver import LRMultiplier
from d2kit.utils import comm
from d2kit.utils.events import EventWriter, JSONWriter
from d2kit.utils.logger import auxiliary

logger = logging.getLogger(__name__)

Callback = Callable[[Any], object]


class CallbackHook(HookBase):
    """Calls functions with the trainer as their argument.

    Args:
        before_train: called before the first iteration.
        after_train: called after the last one.
        before_step: called before each.
        after_step: called after each.
    """

    def __init__(
        self,
        *,
        before_train: Callback | None = None,
        after_train: Callback | None = None,
        before_step: Callback | None = None,
        after_step: Callback | None = None,
    ) -> None:
        self._functions = {
            "before_train": before_train,
            "after_train": after_train,
            "before_step": before_step,
            "after_step": after_step,
        }

    def _call(self, place: str) -> None:
        function = self._functions[place]
        if function is not None:
            function(self.trainer)

    def before_train(self) -> None:
        """Call `before_train`."""
        self._call("before_train")

    def after_train(self) -> None:
        """Call `after_train`, then forget the functions, which may refer to the trainer."""
        self._call("after_train")
        self._functions = dict.fromkeys(self._functions)

    def before_step(self) -> None:
        """Call `before_step`."""
        self._call("before_step")

    def after_step(self) -> None:
        """Call `after_step`."""
        self._call("after_step")


class IterationTimer(HookBase):
    """Measures seconds per iteration (scalar ``time``) and tells the total at the end.

    Hooks that run after this one are outside of ``time``, so register it first.

    Args:
        warmup_iter: iterations at the start that are not measured.
    """

    def __init__(self, warmup_iter: int = 3) -> None:
        self._warmup_iter = warmup_iter
        self._train_start = self._step_start = time.perf_counter()
        self._in_steps = 0.0
        self._measured = 0

    def before_train(self) -> None:
        """Start the clock of the whole training."""
        self._train_start = time.perf_counter()
        self._in_steps, self._measured = 0.0, 0

    def before_step(self) -> None:
        """Start the clock of an iteration."""
        self._step_start = time.perf_counter()

    def after_step(self) -> None:
        """Record the seconds of an iteration."""
        if self.trainer.iter - self.trainer.start_iter < self._warmup_iter:
            return
        seconds = time.perf_counter() - self._step_start
        self._in_steps += seconds
        self._measured += 1
        self.trainer.storage.put_scalars(time=seconds)

    def after_train(self) -> None:
        """Log speed and total time."""
        total = time.perf_counter() - self._train_start
        if not self._measured:
            return
        mean = self._in_steps / self._measured
        iterations = self.trainer.iter - self.trainer.start_iter
        hooks = max(total - mean * iterations, 0.0)
        logger.info(
            "Trained %d iterations in %s (%.4f s per iteration; %s of it in hooks)",
            iterations,
            datetime.timedelta(seconds=round(total)),
            mean,
            datetime.timedelta(seconds=round(hooks)),
        )


class PeriodicWriter(HookBase):
    """Calls writers at intervals and at the end; register it after the hooks that put values.

    Args:
        writers: objects of `EventWriter`.
        period: iterations between two writes.

    Raises:
        TypeError: if one is not an `EventWriter`.
    """

    def __init__(self, writers: Sequence[EventWriter], period: int = 20) -> None:
        for writer in writers:
            if not isinstance(writer, EventWriter):
                raise TypeError(f"a writer must be an EventWriter, got {type(writer).__name__}")
        self._writers = list(writers)
        self._period = period
        self._history: Mapping[str, Any] = {}

    def before_train(self) -> None:
        """Give the storage what a resumed run knew, and cut files back to where it goes on."""
        self.trainer.storage.load_state_dict(self._history)
        for writer in self._writers:
            with _going_on(writer):
                writer.continue_from(self.trainer.start_iter)

    def make_up(self) -> None:
        """Write the line of the iteration before the first, if a kill came between it and the save.

        The checkpoint of an iteration is older than its line. What was written already is not
        written again; writers that cannot tell are left out.
        """
        start = self.trainer.start_iter
        if start == 0 or start % self._period:
            return
        for writer in self._writers:
            if isinstance(writer, JSONWriter):
                with _going_on(writer):
                    writer.write()

    def after_step(self) -> None:
        """Write, if it is time."""
        done = self.trainer.iter + 1
        if done % self._period == 0 or done == self.trainer.max_iter:
            self._write()

    def _write(self) -> None:
        for writer in self._writers:
            with _going_on(writer):
                writer.write()

    def after_train(self) -> None:
        """Write what came since, and close."""
        self._write()
        for writer in self._writers:
            with _going_on(writer):
                writer.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the latest values of the scalars, of which writers take medians."""
        storage = getattr(self.trainer, "storage", None)
        return {} if storage is None else {"history": storage.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take what `state_dict` returned, for the storage of the training to come."""
        self._history = state_dict.get("history", {})


def _going_on(writer: EventWriter) -> AbstractContextManager[None]:
    """Return a context in which a failing writer is one warning: it must not end a training."""
    return auxiliary(f"what {type(writer).__name__} writes")


class LRScheduler(HookBase):
    """Steps a learning-rate schedule and records the rate (scalar ``lr``).

    Args:
        optimizer: None means the trainer's.
        scheduler: a torch scheduler, or a fvcore `ParamScheduler` of progress; None means the
            trainer's.
    """

    def __init__(
        self,
        optimizer: Optimizer | None = None,
        scheduler: TorchScheduler | ParamScheduler | None = None,
    ) -> None:
        self._optimizer = optimizer
        self._scheduler = scheduler

    def before_train(self) -> None:
        """Choose the group whose rate is recorded; make a scheduler of a schedule."""
        run, schedule = self.trainer, self.scheduler
        optimizer: Optimizer = run.optimizer if self._optimizer is None else self._optimizer
        self._optimizer, chosen = optimizer, self.get_best_param_group_id(optimizer)
        self._best_param_group_id = chosen
        if isinstance(schedule, ParamScheduler):
            # the scheduler counts steps done, and goes on where the training stands
            steps = {"max_iter": run.max_iter, "last_iter": run.iter - 1}
            self._scheduler = LRMultiplier(optimizer, schedule, **steps)

    @staticmethod
    def get_best_param_group_id(optimizer: Optimizer) -> int:
        """Return the index of the group whose rate says most: most parameters, or most common."""
        sizes = [len(group["params"]) for group in optimizer.param_groups]
        if max(sizes) > 1:
            return sizes.index(max(sizes))
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        return rates.index(Counter(rates).most_common(1)[0][0])

    def after_step(self) -> None:
        """Record the rate of the iteration just done and go to the next one."""
        assert self._optimizer is not None
        rate = self._optimizer.param_groups[self._best_param_group_id]["lr"]
        self.trainer.storage.put_scalar("lr", rate, smoothing_hint=False)
        self.scheduler.step()

    @property
    def scheduler(self) -> Any:
        """The schedule in use."""
        return self._scheduler or self.trainer.scheduler

    def state_dict(self) -> dict[str, Any]:
        """Return the state of a torch scheduler."""
        if isinstance(self.scheduler, TorchScheduler):
            return self.scheduler.state_dict()
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the state of a torch scheduler."""
        if isinstance(self.scheduler, TorchScheduler):
            self.scheduler.load_state_dict(dict(state_dict))


class TimeForecast(HookBase):
    """Logs the expected time once, after some iterations.

    Evaluations and checkpoints are not in it: what runs between the iterations is not measured.

    Args:
        steps: iterations to measure.
        warmup: iterations before them, which are slower than the others.
    """

    def __init__(self, steps: int = 20, warmup: int = 3) -> None:
        self._steps = steps
        self._warmup = warmup
        self._times: list[float] = []
        self._start = 0.0

    def before_step(self) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def after_step(self) -> None:
        """Stop it; speak after the last iteration that is measured."""
        done = self.trainer.iter + 1 - self.trainer.start_iter
        if not self._warmup < done <= self._warmup + self._steps:
            return
        self._times.append(time.perf_counter() - self._start)
        left = self.trainer.max_iter - self.trainer.iter - 1
        if len(self._times) < self._steps or left <= 0:
            return
        typical = statistics.median(self._times)
        seconds = round(statistics.mean(self._times) * left)
        end = datetime.datetime.now() + datetime.timedelta(seconds=seconds)
        logger.info(
            "After %d iterations (median %.3f s each): %s for the other %s, evaluations and "
            "checkpoints not counted; done about %s",
            self._steps,
            typical,
            datetime.timedelta(seconds=seconds),
            f"{left:,}",
            end.strftime("%Y-%m-%d %H:%M"),
        )


class SkippedImages(HookBase):
    """Lists the damaged images that were skipped since the training began or was resumed.

    All processes have this hook. Where the training did not come to its end each of them speaks
    for itself, because the others may be elsewhere.
    """

    def after_train(self) -> None:
        """Write the list."""
        skipped: list[str] = getattr(self.trainer.data_loader, "skipped", list)()
        if self.trainer.iter >= self.trainer.max_iter:
            everywhere = comm.gather(skipped)
            skipped = sorted({name for names in everywhere for name in names})
        if skipped:
            logger.warning(
                "%d damaged images were skipped:\n  %s", len(skipped), "\n  ".join(skipped)
            )


class EpochLoss(HookBase):
    """Puts the mean of the losses of each epoch into the storage, as ``epoch/total_loss``.

    Epoch e ends after iteration round(e x `per_epoch`); the last one may be a part. A resumed run
    goes on with the sum that the checkpoint holds, if this hook runs before the one that saves.

    Args:
        per_epoch: iterations in one pass over the training set, above 0.
    """

    def __init__(self, per_epoch: float) -> None:
        self.per_epoch = per_epoch
        self._sum, self._count = 0.0, 0

    def after_step(self) -> None:
        """Add the loss of this iteration; write the mean at the end of an epoch."""
        found = self.trainer.storage.latest().get("total_loss")
        if found is not None and found[1] == self.trainer.iter:
            self._sum, self._count = self._sum + found[0], self._count + 1
        done = self.trainer.iter + 1
        if self._count and (done == self.trainer.max_iter or self._is_end(done)):
            self.trainer.storage.put_scalar(
                "epoch/total_loss", self._sum / self._count, smoothing_hint=False
            )
            self._sum, self._count = 0.0, 0

    def _is_end(self, done: int) -> bool:
        return done == round(round(done / self.per_epoch) * self.per_epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return the sum of the losses of the epoch so far, and their number."""
        return {"sum": self._sum, "count": self._count}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._sum, self._count = state_dict["sum"], state_dict["count"]


def writing_period(hook: EpochLoss | None) -> int:
    """Return the iterations between two writings: 20, or fewer where epochs are shorter.

    Writers see the latest value of a name only: they must write once in each epoch.
    """
    return 20 if hook is None else min(20, max(1, int(hook.per_epoch)))


def report_epochs(trainer: TrainerBase, folder: str | os.PathLike[str]) -> None:
    """Log loss and metrics of each epoch as a table, and draw them into ``epochs.png``.

    Args:
        trainer: after its training; nothing happens where it has no `EpochLoss`.
        folder: where ``metrics.json`` is.
    """
    hook = next((hook for hook in trainer._hooks if isinstance(hook, EpochLoss)), None)
    metrics = Path(folder, "metrics.json")
    if hook is None or not metrics.is_file():
        return
    from d2kit.visualization.plots import epoch_rows, plot_epochs, read_metrics, table_of_epochs

    rows = epoch_rows(read_metrics(metrics), hook.per_epoch, trainer.max_iter)
    if rows:
        picture = plot_epochs(rows, Path(folder, "epochs.png"))
        logger.info("Epochs (%s):\n%s", picture, table_of_epochs(rows))


class TorchProfiler(HookBase):
    """Runs chosen iterations under `torch.profiler` and writes a trace of each.

    Args:
        enable_predicate: trainer -> whether to profile the coming iteration.
        output_dir: gets ``profiler_iter<N>.json`` (chrome://tracing) or, for TensorBoard, a folder
            ``log``.
        activities: as in `torch.profiler.profile`; None means CPU and, if there is one, CUDA.
        save_tensorboard: write for TensorBoard's profiler plug-in.
    """

    def __init__(
        self,
        enable_predicate: Callable[[Any], bool],
        output_dir: str,
        *,
        activities: Iterable[Any] | None = None,
        save_tensorboard: bool = True,
    ) -> None:
        self._enable_predicate = enable_predicate
        self._output_dir = output_dir
        self._activities = activities
        self._save_tensorboard = save_tensorboard
        self._profiler: Any = None

    def before_step(self) -> None:
        """Start profiling, if the predicate says so."""
        if not self._enable_predicate(self.trainer):
            return
        on_ready = None
        if self._save_tensorboard:
            folder = os.path.join(self._output_dir, "log", f"profiler_iter{self.trainer.iter}")
            on_ready = torch.profiler.tensorboard_trace_handler(folder)
        self._profiler = torch.profiler.profile(
            activities=self._activities,
            on_trace_ready=on_ready,
            record_shapes=True,
            profile_memory=True,
            with_stack=True,
        )
        self._profiler.__enter__()

    def after_step(self) -> None:
        """Stop profiling and write the trace."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.__exit__(None, None, None)
        if not self._save_tensorboard:
            os.makedirs(self._output_dir, exist_ok=True)
            name = f"profiler_iter{self.trainer.iter}.json"
            profiler.export_chrome_trace(os.path.join(self._output_dir, name))


class AutogradProfiler(TorchProfiler):
    """`TorchProfiler` that writes traces for chrome://tracing only.

    Args:
        enable_predicate: trainer -> whether to profile the coming iteration.
        output_dir: gets ``profiler_iter<N>.json``.
        use_cuda: whether to profile CUDA kernels too, where there is a device.
    """

    def __init__(
        self,
        enable_predicate: Callable[[Any], bool],
        output_dir: str,
        *,
        use_cuda: bool = True,
    ) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if use_cuda and torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        super().__init__(
            enable_predicate, output_dir, activities=activities, save_tensorboard=False
        )


class TorchMemoryStats(HookBase):
    """Logs the CUDA memory in use, at intervals at the start of the training.

    Args:
        period: iterations between two logs.
        max_runs: number of logs.
    """

    def __init__(self, period: int = 20, max_runs: int = 10) -> None:
        self._period = period
        self._max_runs = max_runs
        self._runs = 0

    def after_step(self) -> None:
        """Log, if it is time."""
        done = self.trainer.iter + 1
        due = done % self._period == 0 or done == self.trainer.max_iter
        if not torch.cuda.is_initialized() or not due or self._runs >= self._max_runs:
            return
        mebi = 1024.0**2
        logger.info(
            "iteration %d: CUDA memory reserved %.0f (peak %.0f), allocated %.0f (peak %.0f) MiB",
            self.trainer.iter,
            torch.cuda.memory_reserved() / mebi,
            torch.cuda.max_memory_reserved() / mebi,
            torch.cuda.memory_allocated() / mebi,
            torch.cuda.max_memory_allocated() / mebi,
        )
        self._runs += 1
        torch.cuda.reset_peak_memory_stats()
