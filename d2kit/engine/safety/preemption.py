"""Stops a training when the cluster asks for it, with a checkpoint of the last full step."""

import logging
import os
import signal
import subprocess
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from d2kit.checkpoint import DetectionCheckpointer
from d2kit.engine.trainer_base import HookBase, TrainerBase
from d2kit.utils import comm

__all__ = ["Preemption", "add_preemption"]

logger = logging.getLogger(__name__)

# In the order of their weight: SLURM follows SIGUSR1 with SIGTERM, and the job must come back.
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class Preemption(HookBase):
    """After SIGTERM or SIGUSR1 to any process, all save and leave after the same step.

    The exit code is 128 + the signal's number, 143 for SIGTERM. After SIGUSR1, which SLURM sends
    some time before the end of a job (``#SBATCH --signal=USR1@120``), the job is queued again.
    Register it last, on all processes; it acts only where `train` runs in the main thread.

    Args:
        checkpointer: saves.
    """

    def __init__(self, checkpointer: DetectionCheckpointer) -> None:
        self._checkpointer = checkpointer
        self._asked = 0  # place in SIGNALS, from 1; 0: nothing
        self._before: dict[int, Any] = {}
        self._answer = torch.zeros(1, dtype=torch.int64)
        self._work: Any = None

    def before_train(self) -> None:
        """Take over the signals."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)

    def after_train(self) -> None:
        """Give the signals back."""
        self._work = None
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = max(self._asked, SIGNALS.index(signal.Signals(number)) + 1)

    def before_step(self) -> None:
        """Tell the others what was asked; they answer while the step runs."""
        if comm.get_world_size() > 1:
            self._answer.fill_(self._asked)
            group = comm.cpu_group()
            self._work = dist.all_reduce(
                self._answer, dist.ReduceOp.MAX, group=group, async_op=True
            )

    def after_step(self) -> None:
        """Save and leave, if any process was asked to."""
        asked = self._asked
        if self._work is not None:
            self._work.wait()
            self._work = None
            asked = int(self._answer.item())
        if asked:
            self._leave(SIGNALS[asked - 1])

    def _leave(self, number: signal.Signals) -> None:
        iteration = self.trainer.iter
        name = f"model_{iteration:07d}"
        if not self._checkpointer.wrote(name):
            self._checkpointer.save(name, iteration=iteration)
        if comm.is_main_process():
            logger.warning(
                "%s: stopped after iteration %d, saved as %s.pth; --resume goes on from there",
                number.name,
                iteration,
                name,
            )
            if number == signal.SIGUSR1:
                requeue()
        comm.synchronize()  # nobody leaves before the file is complete
        raise SystemExit(128 + number)


def requeue() -> None:
    """Ask SLURM to queue this job again; does nothing outside of a job."""
    job = os.environ.get("SLURM_JOB_ID")
    if not job:
        return
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        logger.error("SLURM job %s could not be queued again: %s", job, error)  # noqa: TRY400


def add_preemption(trainer: TrainerBase, checkpointer: DetectionCheckpointer) -> None:
    """Register a `Preemption` behind all other hooks of a trainer, unless it has one."""
    if not any(isinstance(hook, Preemption) for hook in trainer._hooks):
        trainer.register_hooks([Preemption(checkpointer)])
