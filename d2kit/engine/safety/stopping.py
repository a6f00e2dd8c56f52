"""Ends a run when the cluster asks for it, or when one of its processes is stuck."""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from d2kit.checkpoint import DetectionCheckpointer
from d2kit.engine.trainer_base import HookBase, TrainerBase
from d2kit.utils import comm, stopping

logger = logging.getLogger(__name__)

# In the order of their weight: SLURM follows SIGUSR1 with SIGTERM, and the job must come back.
SIGNALS = [
    getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
]


class Preemption(HookBase):
    """After SIGTERM, SIGHUP or SIGUSR1 to any process, all save and leave after the same step.

    A signal during an evaluation ends it between two images, and in a single process a wait for a
    batch that goes on for seconds: a stuck loader would make it endless. A second Ctrl-C ends the
    process at once, without waiting for what the first one has begun.

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
        # One process may leave while it waits for a batch; others would wait for it in theirs
        stopping.ask(SIGNALS[self._asked - 1], at_once=comm.get_world_size() == 1)

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


LONGEST_PAUSE = 5.0  # seconds between two looks
EARLIER = 0.75  # of the time after which torch gives up waiting, without a name


class _Watchdog:
    """Shows the others that this process lives, and looks whether they do.

    Args:
        seconds: without a sign of life, after which a process counts as stuck.
    """

    def __init__(self, seconds: float) -> None:
        several = dist.is_available() and dist.is_initialized()
        store: Any = dist.distributed_c10d._get_default_store() if several else None
        # a connection of its own: that of the main thread may be busy waiting
        self._store = store.clone() if hasattr(store, "clone") else store
        self._seconds = seconds
        self._pause = min(seconds / 20, LONGEST_PAUSE)
        self._rank, self._world = comm.get_rank(), comm.get_world_size()
        self._end = threading.Event()
        self._parent = multiprocessing.parent_process() if several else None
        self._orphaned = 0  # looks at which the process that launched this one was gone
        self._slept = 0.0  # seconds in which this process was stopped as a whole (Ctrl-Z)
        self._asleep_before = (0.0, 0.0)  # when the step in progress began; `_slept` at that time
        self._answered = time.monotonic()
        self._seen = {rank: ("", self._answered) for rank in range(self._world)}
        self._threads = [
            threading.Thread(target=task, name="watchdog", daemon=True)
            for task in ((self._show, self._look) if several else (self._look,))
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._end.set()
        for thread in self._threads:  # one inside the store at the interpreter's end aborts it
            thread.join(LONGEST_PAUSE)

    def _show(self) -> None:
        """Exchange signs of life through the store, which rank 0 serves."""
        for count in itertools.count():
            place = f"process {os.getpid()} on {socket.gethostname()}"
            work = stopping.work()
            step = "" if work is None else f", in {work.what}"
            try:
                self._store.set(_key(self._rank), f"{count}|{place}{step}")
                for rank in range(self._world):
                    if self._store.check([_key(rank)]):
                        self._note(rank, self._store.get(_key(rank)).decode())
            except RuntimeError:
                return  # rank 0 has ended, which the next message to it tells
            self._answered = time.monotonic()
            if self._end.wait(self._pause):
                return

    def _note(self, rank: int, sign: str) -> None:
        if sign != self._seen[rank][0]:
            self._seen[rank] = (sign, time.monotonic())

    def _look(self) -> None:
        before = time.monotonic()
        while not self._end.wait(self._pause / 2):
            now = time.monotonic()
            self._slept += max(now - before - 3 * self._pause, 0)  # this process was stopped
            before = now
            if self._parent is not None and not self._parent.is_alive():
                self._orphaned += 1
            # torch interrupts the children of a killed parent, and a callback may swallow that
            if self._orphaned > 2:
                print(f"[rank {self._rank}] the process that launched it is gone", file=sys.stderr)
                os._exit(1)
            stuck = self._stuck()
            if stuck and not self._end.is_set():
                self._abort(stuck)

    def _stuck(self) -> str:
        """Say which process is stuck; "" for none."""
        now = time.monotonic()
        if self._store is None:
            return self._stuck_step(now)
        if now - self._answered > self._seconds:
            # set() in `_show` may be raising at this moment: the store is served by rank 0
            return self._of(0, "does not answer") if self._rank else ""
        for rank, (_, since) in self._seen.items():
            if now - since > self._seconds:
                return self._of(rank, "gives no sign of life (stopped, or its machine is gone)")
        return self._stuck_step(now)

    def _stuck_step(self, now: float) -> str:
        """Say that the step in progress has no end; not where a debugger holds it."""
        step = stopping.work()
        if step is None:
            return ""
        if self._asleep_before[0] != step.since:
            self._asleep_before = (step.since, self._slept)
        took = now - step.since - (self._slept - self._asleep_before[1])
        # Later than the others' silence: who waits in a step for a silent process is not the stuck
        # one, and that one's last sign came up to two pauses after the step began.
        if took <= self._seconds + 3 * self._pause or _is_debugged():
            return ""
        names: list[str] = getattr(getattr(step.loader, "samples", None), "names_in_work", list)()
        loading = f", its loader at work on {'; '.join(names[:5])}" if names else ""
        who = f"rank {self._rank} (this one)" if self._store is not None else "this process"
        return f"{who} has been in {step.what} without an end{loading}"

    def _of(self, rank: int, what: str) -> str:
        place = self._seen[rank][0].partition("|")[2] or "never heard of"
        return f"rank {rank} ({place}) {what}"

    def _abort(self, stuck: str) -> None:
        print(
            f"[rank {self._rank}] watchdog: {stuck} for {self._seconds:g} s; ending the run. "
            "What this process was doing:",
            file=sys.stderr,
            flush=True,
        )
        with contextlib.suppress(Exception):  # a stream that is no file
            faulthandler.dump_traceback(sys.stderr)
        os._exit(1)  # the main thread waits for the stuck one and cannot be asked


def _is_debugged() -> bool:
    """Whether the main thread stands in Python's debugger, which waits for its user."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        if frame.f_globals.get("__name__") in ("pdb", "bdb"):
            return True
        frame = frame.f_back
    return False


def _key(rank: int) -> str:
    return f"d2kit/alive/{rank}"


@contextlib.contextmanager
def watchdog(timeout: timedelta) -> Iterator[None]:
    """Watch over the processes of the default group meanwhile, without one over this one.

    Args:
        timeout: of the group; three quarters of it without a sign of life, or inside one step of a
            training or evaluation, and a process counts as stuck and the others end the run.
    """
    watch: Any = _Watchdog(EARLIER * timeout.total_seconds())
    try:
        yield
    finally:
        watch.stop()
