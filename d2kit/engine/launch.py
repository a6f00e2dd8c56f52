"""Starts the processes of a training: on this machine, or as told by torchrun or SLURM."""

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from d2kit.engine._cluster import Place, find_place
from d2kit.engine._hooks_preemption import SIGNALS
from d2kit.engine._rendezvous import torchrun_store
from d2kit.engine._watchdog import watchdog
from d2kit.utils import comm

__all__ = ["DEFAULT_TIMEOUT", "launch"]

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT = timedelta(minutes=30)
GRACE = 3.0  # seconds that processes have to end after one failed, before SIGTERM, then SIGKILL


def _find_free_port() -> int:
    """Return a TCP port of this machine that nobody listens on."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def launch(
    main_func: Callable[..., Any],
    num_gpus_per_machine: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str | None = None,
    args: Sequence[Any] = (),
    timeout: timedelta = DEFAULT_TIMEOUT,
    *,
    num_processes: int | None = None,
) -> None:
    """Call `main_func` in every process of a training.

    Where torchrun or srun started this process, it joins the others and starts none itself; the
    numbers given here are then not used. Otherwise it starts one process per GPU, or
    `num_processes` processes that talk through gloo and share the CPU cores. One process alone
    is this one.

    Args:
        main_func: called with `args`; must be importable by name.
        num_gpus_per_machine: processes per machine, one GPU each; 0 or 1: a single process.
        num_machines: machines; start the program once on each.
        machine_rank: index of this machine.
        dist_url: where rank 0 listens, e.g. ``tcp://10.0.0.1:5000``; None or "auto": a free port
            of this machine, for one machine only.
        args: arguments of `main_func`.
        timeout: after which a process that waits for the others gives up; a process that is stuck
            for as long is named, with a stack trace, and ends the run.
        num_processes: processes on this machine without GPUs; None or 0: as many as GPUs.

    Raises:
        ValueError: if the numbers do not fit the machine.
        SystemExit: with its code, if a process ended by one.
        torch.multiprocessing.ProcessRaisedException: if a process raised; with its traceback.
    """
    place = find_place()
    if place is not None:
        _run(main_func, args, place, f"tcp://{place.address}:{place.port}", timeout, spawned=False)
        return
    on_cpu = bool(num_processes)
    local_size = int(num_processes or max(num_gpus_per_machine, 1))
    if not on_cpu and local_size > 1 and local_size > torch.cuda.device_count():
        raise ValueError(
            f"--num-gpus {local_size} asked for, but this machine has "
            f"{torch.cuda.device_count()} CUDA devices; several processes on the CPU are started "
            f"by --num-processes {local_size}"
        )
    if not 0 <= machine_rank < num_machines:
        raise ValueError(f"machine_rank must be in [0, {num_machines}), got {machine_rank}")
    if num_machines * local_size == 1:
        main_func(*args)
        return
    if dist_url in (None, "auto"):
        if num_machines > 1:
            raise ValueError("several machines need --dist-url tcp://<machine 0>:<port>")
        dist_url = f"tcp://127.0.0.1:{_find_free_port()}"
    _spawn(
        (local_size, num_machines, machine_rank, dist_url, main_func, args, timeout, on_cpu),
        local_size,
    )


def _spawn(worker_args: tuple[Any, ...], count: int) -> None:
    """Start `count` processes and wait for them."""
    from torch import multiprocessing as mp

    try:
        started = mp.start_processes(
            _spawned_worker, worker_args, nprocs=count, join=False, start_method="spawn"
        )
        with _passed_on_signals([process.pid for process in started.processes]):
            while not started.join(grace_period=GRACE):
                pass
    except mp.ProcessExitedException as error:
        if error.exit_code > 0:  # it has said why: SystemExit
            raise SystemExit(error.exit_code) from None
        raise


@contextmanager
def _passed_on_signals(pids: Sequence[int]) -> Iterator[None]:
    """Pass SIGTERM and SIGUSR1 on to child processes, which stop in their own time."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _spawned_worker(
    local_rank: int,
    local_size: int,
    num_machines: int,
    machine_rank: int,
    dist_url: str,
    main_func: Callable[..., Any],
    args: Sequence[Any],
    timeout: timedelta,
    on_cpu: bool,
) -> None:
    _distributed_worker(
        local_rank,
        main_func,
        num_machines * local_size,
        local_size,
        machine_rank,
        dist_url,
        args,
        timeout,
        on_cpu=on_cpu,
    )


def _distributed_worker(
    local_rank: int,
    main_func: Callable[..., Any],
    world_size: int,
    num_gpus_per_machine: int,
    machine_rank: int,
    dist_url: str,
    args: Sequence[Any],
    timeout: timedelta = DEFAULT_TIMEOUT,
    *,
    on_cpu: bool = False,
) -> None:
    """Join the other processes and call `main_func`; runs in each process that `launch` starts.

    Args:
        local_rank: index of this process on its machine.
        main_func: what to call.
        world_size: number of processes on all machines.
        num_gpus_per_machine: number of processes on each.
        machine_rank: index of this machine.
        dist_url: where rank 0 listens.
        args: arguments of `main_func`.
        timeout: after which a process that waits for the others gives up.
        on_cpu: use gloo and no GPU.
    """
    rank = machine_rank * num_gpus_per_machine + local_rank
    place = Place(rank, world_size, local_rank, num_gpus_per_machine, "", 0, "launch")
    _run(main_func, args, place, dist_url, timeout, spawned=True, on_cpu=on_cpu)


def _choose_gpu(place: Place, gpus: int) -> None:
    """Make this process's GPU the current one; SLURM may show each task only its own."""
    if 1 < gpus <= place.local_rank:
        raise ValueError(
            f"process {place.local_rank} of this machine has no GPU: {place.local_size} processes, "
            f"{gpus} CUDA devices; start fewer, or hide the GPUs (CUDA_VISIBLE_DEVICES=) to train "
            "on the CPU"
        )
    torch.cuda.set_device(min(place.local_rank, gpus - 1))


def _run(
    main_func: Callable[..., Any],
    args: Sequence[Any],
    place: Place,
    dist_url: str,
    timeout: timedelta,
    *,
    spawned: bool,
    on_cpu: bool = False,
) -> None:
    """Set up torch.distributed for this process, call `main_func`, tear it down."""
    gpus = 0 if on_cpu else torch.cuda.device_count()
    if gpus:
        _choose_gpu(place, gpus)
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, (cores or 1) // place.local_size))
    if place.world_size == 1 and not spawned:
        main_func(*args)
        return
    store = torchrun_store(timeout) if place.source == "torchrun" else None
    dist.init_process_group(
        backend="nccl" if gpus else "gloo",
        init_method=dist_url if store is None else None,
        store=store,
        world_size=place.world_size,
        rank=place.rank,
        timeout=timeout,
    )
    comm.create_local_process_group(place.local_size)
    comm.synchronize()
    with watchdog(timeout):
        main_func(*args)
        comm.synchronize()
    # Not after a failure: the others would fail too, at once, and their complaint about a lost
    # connection would hide the reason.
    dist.destroy_process_group()
