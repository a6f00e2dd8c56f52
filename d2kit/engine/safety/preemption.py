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
from d2kit.utils import comm, stopping

__all__ = ["Preemption", "add_preemption", "leave_now"]

logger = logging.getLogger(__name__)

# In the order of their weight: SLURM follows SIGUSR1 with SIGTERM, and the job must come back.
SIGNALS = [
    getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
]


class Preemption(HookBase):
    """After SIGTERM, SIGHUP or SIGUSR1 to any process, all save and leave after the same step.

    A signal during an evaluation ends it between two images. A second Ctrl-C ends the process at
    once, without waiting for what the first one has begun.

    The exit code is 128 + the signal's number, 143 for SIGTERM. After SIGUSR1, which SLURM sends
    some time before the end of a job (``#SBATCH --signal=USR1@120``), the job is queued again.
    Register it last, on all processes; it acts only where `train` runs in the main thread.

    Args:
        checkpointer: saves.
    """

    def __init__(self, checkpointer: DetectionCheckpointer) -> None:
        self._checkpointer = checkpointer
        self._asked = 0  # place in SIGNALS, from 1; 0: nothing
        self._interrupts = 0
        self._before: dict[int, Any] = {}
        self._answer = torch.zeros(1, dtype=torch.int64)
        self._work: Any = None

    def before_train(self) -> None:
        """Take over the signals."""
        if threading.current_thread() is not threading.main_thread():
            return
        stopping.forget()
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                self._before[number] = signal.signal(number, self._note)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)

    def after_train(self) -> None:
        """Give the signals back."""
        self._work = None
        stopping.forget()
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = max(self._asked, SIGNALS.index(signal.Signals(number)) + 1)
        stopping.ask(SIGNALS[self._asked - 1])

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += 1
        if self._interrupts > 1:
            os.write(2, b"\nsecond Ctrl-C: ending at once\n")
            os._exit(128 + number)  # the lock of the folder is void with its process
        raise KeyboardInterrupt

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

    def leave_evaluation(self) -> None:
        """Save and leave, without waiting for others: they may be anywhere in the evaluation."""
        self._leave(SIGNALS[max(self._asked, 1) - 1], wait=False)

    def _leave(self, number: signal.Signals, *, wait: bool = True) -> None:
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
        if wait:
            comm.synchronize()  # nobody leaves before the file is complete
        raise SystemExit(128 + number)


def leave_now(trainer: TrainerBase) -> None:
    """Save the last step of a trainer with a `Preemption`, and leave."""
    for hook in trainer._hooks:
        if isinstance(hook, Preemption):
            hook.leave_evaluation()


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
