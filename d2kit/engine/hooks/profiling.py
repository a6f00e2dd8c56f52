"""Hooks that profile time and memory."""

import logging
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch

from d2kit.engine.trainer_base import HookBase

__all__ = ["AutogradProfiler", "TorchMemoryStats", "TorchProfiler"]

logger = logging.getLogger(__name__)


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
