"""Starts the processes of a training: on this machine, or as told by torchrun or SLURM."""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store

from d2kit.engine.safety.stopping import SIGNALS, watchdog
from d2kit.utils import comm
from d2kit.utils.devices import available_cores

__all__ = ["DEFAULT_TIMEOUT", "launch"]


PAUSE = 0.02  # seconds between two looks of rank 0


def torchrun_store(timeout: timedelta) -> Store:
    """Return the store through which the processes that torchrun started find each other.

    torchrun keeps one store while it restarts failed processes, and torch 2.15 puts no difference
    between their lives: a restarted process reads where a dead one listened, and waits for it.

    Args:
        timeout: after which a process that waits for the others gives up.
    """
    store, rank, world_size = next(iter(dist.rendezvous("env://", timeout=timeout)))
    return fresh_store(store, rank, world_size, timeout)


def fresh_store(store: Store, rank: int, world_size: int, timeout: timedelta) -> Store:
    """Return the part of a shared store that only the processes alive now know of.

    Each process leaves a word that nobody used before, and rank 0 answers every word with the name
    of the part, until all have confirmed that name. Words of dead processes, which may still lie
    there, are answered too, which nobody reads.

    Args:
        store: may hold anything that earlier processes of this job wrote.
        rank: of this process.
        world_size: number of processes that call this.
        timeout: for the whole.

    Raises:
        torch.distributed.DistStoreError: if rank 0 does not answer in time.
        TimeoutError: on rank 0, if a process does not confirm in time.
    """
    word = uuid.uuid4().hex
    if rank > 0:
        store.set(f"d2kit/word/{rank}", word)
        store.wait([f"d2kit/answer/{word}"], timeout)
        name = store.get(f"d2kit/answer/{word}").decode()
        store.set(f"d2kit/confirmed/{name}/{rank}", "")
        return PrefixStore(name, store)
    waiting = set(range(1, world_size))
    end = time.monotonic() + timeout.total_seconds()
    while waiting:
        for other in sorted(waiting):
            if store.check([f"d2kit/word/{other}"]):
                store.set(f"d2kit/answer/{store.get(f'd2kit/word/{other}').decode()}", word)
            if store.check([f"d2kit/confirmed/{word}/{other}"]):
                waiting.remove(other)
        if waiting and time.monotonic() > end:
            raise TimeoutError(f"ranks {sorted(waiting)} of {world_size} have not come in time")
        time.sleep(PAUSE)
    return PrefixStore(word, store)


@dataclass(frozen=True)
class Place:
    """A process among those of its job.

    Args:
        rank: index among all, in [0, world_size).
        world_size: number of processes.
        local_rank: index among those of its machine.
        local_size: number of processes on its machine.
        address: host name of rank 0.
        port: where rank 0 listens.
        source: who said so, for messages.
    """

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    address: str
    port: int
    source: str


def find_place(env: Mapping[str, str] = os.environ) -> Place | None:
    """Read this process's place from the environment of torchrun or of a SLURM job step.

    Args:
        env: environment variables.

    Returns:
        None where neither started this process.

    Raises:
        ValueError: if a variable that belongs to it is missing.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        return _from_torchrun(env)
    if "SLURM_PROCID" in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return _from_slurm(env)
    return None


def _need(env: Mapping[str, str], name: str, source: str) -> str:
    if name not in env:
        raise ValueError(f"the environment of {source} lacks {name}; start with torchrun or srun")
    return env[name]


def _from_torchrun(env: Mapping[str, str]) -> Place:
    world = int(env["WORLD_SIZE"])
    return Place(
        rank=int(env["RANK"]),
        world_size=world,
        local_rank=int(_need(env, "LOCAL_RANK", "torchrun") if world > 1 else "0"),
        local_size=int(env.get("LOCAL_WORLD_SIZE", str(world))),
        address=_need(env, "MASTER_ADDR", "torchrun"),
        port=int(_need(env, "MASTER_PORT", "torchrun")),
        source="torchrun",
    )


def _from_slurm(env: Mapping[str, str]) -> Place:
    # "4(x2),3" means 4, 4, 3 tasks; machines of a job step must have as many tasks each.
    tasks = env.get("SLURM_STEP_TASKS_PER_NODE") or _need(env, "SLURM_TASKS_PER_NODE", "SLURM")
    counts = re.findall(r"(\d+)(?:\(x\d+\))?", tasks)
    if len(set(counts)) > 1:
        raise ValueError(f"SLURM runs {tasks} tasks per node; all nodes need the same number")
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_NODELIST")
    nodes = nodes or _need(env, "SLURM_JOB_NODELIST", "SLURM")
    job = int(env.get("SLURM_JOB_ID", "0"))
    return Place(
        rank=int(env["SLURM_PROCID"]),
        world_size=int(env["SLURM_STEP_NUM_TASKS"]),
        local_rank=int(_need(env, "SLURM_LOCALID", "SLURM")),
        local_size=int(counts[0]),
        address=env.get("MASTER_ADDR") or first_host(nodes),
        port=int(env.get("MASTER_PORT") or 20000 + job % 20000),
        source="SLURM",
    )


def first_host(nodelist: str) -> str:
    """Return the first host of a SLURM node list, e.g. ``gpu007`` of ``gpu[007-009,12],login``.

    Args:
        nodelist: hosts with ranges in one or more pairs of brackets, separated by commas.

    Raises:
        ValueError: if it cannot be read.
    """
    # the first of each range: "r[1-2]n[03,07]" -> "r1n03"
    plain = re.sub(r"\[(\w+)(?:[-,][\w,-]*)?\]", r"\1", nodelist)
    host = plain.partition(",")[0]
    if not re.fullmatch(r"[\w.-]+", host):
        raise ValueError(f"cannot read the SLURM node list '{nodelist}'")
    return host


def local_variables(env: Mapping[str, str]) -> dict[str, str]:
    """Return torchrun's variables for a process of submitit's executor for one machine.

    Args:
        env: environment variables.

    Returns:
        Empty elsewhere: SLURM tells its processes itself who they are.
    """
    if env.get("SUBMITIT_EXECUTOR") != "local":
        return {}
    count = env["SUBMITIT_LOCAL_NTASKS"]
    # all processes of the job must choose the same port without talking to each other
    port = 20000 + int(env["SUBMITIT_LOCAL_JOB_ID"]) % 20000
    return {
        "RANK": env["SUBMITIT_LOCAL_GLOBALID"],
        "LOCAL_RANK": env["SUBMITIT_LOCAL_LOCALID"],
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


class TrainingProcess:
    """Replaces the process by a command, which then gets the signals and sets the exit code.

    A child would share both with submitit, which would queue the job again by itself, beside the
    training that does so once its checkpoint is written.

    Args:
        command: program and arguments.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self.command = list(command)

    def __call__(self) -> None:
        """Run the command; does not return."""
        env = {**os.environ, **local_variables(os.environ)}
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(self.command[0], self.command, env)


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
        num_processes: processes on this machine that use its CPU, also where it has GPUs: these
            are hidden from them if there are several; None or 0: as many as GPUs.

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
    if not on_cpu and local_size > max(torch.cuda.device_count(), 1):
        raise ValueError(
            f"--num-gpus {local_size} asked for, but this machine has {torch.cuda.device_count()} "
            f"CUDA devices; --num-processes {local_size} starts processes on the CPU"
        )
    if not 0 <= machine_rank < num_machines:
        raise ValueError(f"machine_rank must be in [0, {num_machines}), got {machine_rank}")
    if num_machines * local_size == 1:
        with watchdog(timeout):
            main_func(*args)
        return
    if dist_url in (None, "auto"):
        if num_machines > 1:
            raise ValueError("several machines need --dist-url tcp://<machine 0>:<port>")
        dist_url = f"tcp://127.0.0.1:{_find_free_port()}"
    given = (local_size, num_machines, machine_rank, dist_url, main_func, args, timeout, on_cpu)
    _spawn(given, local_size, on_cpu=on_cpu)


def launch_as_asked(
    main_func: Callable[..., Any], options: argparse.Namespace, *args: object
) -> None:
    """Call `launch` with the machines and processes that a command line asks for.

    Args:
        main_func: called with `options` and `args`.
        options: of `default_argument_parser`.
        args: further arguments of `main_func`.
    """
    launch(
        main_func,
        options.num_gpus,
        num_machines=options.num_machines,
        machine_rank=options.machine_rank,
        dist_url=options.dist_url,
        num_processes=options.num_processes,
        args=(options, *args),
    )


@contextmanager
def _hidden_gpus() -> Iterator[None]:
    """Hide the GPUs from processes that are started inside: a config's ``cuda`` is then the CPU."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        yield
    finally:
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def _spawn(worker_args: tuple[Any, ...], count: int, *, on_cpu: bool = False) -> None:
    """Start `count` processes and wait for them."""
    from torch import multiprocessing as mp

    passed: list[int] = []
    try:
        with _hidden_gpus() if on_cpu else nullcontext():
            started = mp.start_processes(
                _spawned_worker, worker_args, nprocs=count, join=False, start_method="spawn"
            )
        with _passed_on_signals([process.pid for process in started.processes], passed):
            while not started.join(grace_period=GRACE):
                pass
    except mp.ProcessExitedException as error:
        if error.exit_code > 0:  # it has said why: SystemExit
            raise SystemExit(error.exit_code) from None
        if -error.exit_code in passed:  # before the training took signals over
            raise SystemExit(128 - error.exit_code) from None
        raise


@contextmanager
def _passed_on_signals(pids: Sequence[int], passed: list[int]) -> Iterator[None]:
    """Pass SIGTERM and its like on to child processes, which stop in their own time.

    Args:
        pids: of the processes.
        passed: gets the numbers of the signals that came.
    """

    def pass_on(number: int, frame: FrameType | None) -> None:
        passed.append(number)
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
    own = gpus == 1 and place.source == "SLURM"
    if place.local_size > gpus and not own:
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
        torch.set_num_threads(max(1, available_cores() // place.local_size))
    if place.world_size == 1 and not spawned:
        with watchdog(timeout):
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
