"""Tiny trainings in processes that may be killed: forked from one that has imported everything."""

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import torch

from d2kit.engine import CallbackHook
from tests.support import tiny_run as tiny

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.support.fault_runs", "d2kit.data", "d2kit.solver"])


def start(function, *args):
    """Start `function(*args)` in a process of its own."""
    process = CONTEXT.Process(target=_quietly, args=(function, args))
    process.start()
    return process


def _quietly(function, args):
    torch.set_num_threads(1)
    # loader workers must be children of this process, to notice that it was killed
    multiprocessing.set_start_method("fork", force=True)
    function(*args)


def patience(seconds):
    """Return how long to wait for what takes `seconds` where nobody else uses the cores."""
    work, wall, cpu = 0.2, time.perf_counter(), time.process_time()
    while time.process_time() - cpu < work:
        pass
    return seconds * max(1.0, (time.perf_counter() - wall) / work)


def finish(process, seconds=600):
    """Wait, as long as nothing hangs; return the exit code, negative for a signal."""
    process.join(seconds)
    alive = process.is_alive()
    if alive:
        process.kill()
        process.join()
    assert not alive, f"still running after {seconds} s"
    return process.exitcode


class QuietTrainer(tiny.TinyTrainer):
    """Without noise the losses do not depend on how a batch is split."""

    noise = False


def train(folder, output, options=(), progress=None, act=None, noise=True, kind=None):
    """Train or go on; each iteration sets `progress` and calls `act(trainer)` as it begins."""
    tiny.register(Path(folder) / "images")
    kind = kind or (tiny.TinyTrainer if noise else QuietTrainer)
    trainer = kind(tiny.tiny_cfg(Path(folder) / output, *options))

    def begin(trainer):
        if progress is not None:
            progress.value = trainer.iter
        if act is not None:
            act(trainer)

    log = Path(folder) / output / f"images{os.getpid()}.txt"

    def end(trainer):
        with log.open("a") as file:
            file.write(json.dumps([trainer.iter, trainer._trainer._images]) + "\n")

    trainer.register_hooks([CallbackHook(before_step=begin, after_step=end)])
    trainer.resume_or_load(resume=True)
    trainer.train()


def images(output):
    """Return the images of each iteration, the last time that it ran."""
    found = {}
    for path in sorted(output.glob("images*.txt"), key=lambda path: path.stat().st_mtime_ns):
        for line in path.read_text().splitlines():
            if line.endswith("]"):
                iteration, ids = json.loads(line)
                found[iteration] = ids
    return [found[key] for key in sorted(found)]


def metrics(output):
    """Return (iteration, losses) of each line of ``metrics.json``, in the order of the file."""
    rows = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    return [
        (row["iteration"], {k: v for k, v in row.items() if "loss" in k or k == "lr"})
        for row in rows
        if "total_loss" in row
    ]


def wait_for(condition, seconds=600.0):
    """Wait until something is true, as long as nothing hangs."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.001)


def kill_at_random(folder, output, options, step, rng: random.Random, kind=None):
    """Train until `step` has begun, and kill somewhat later."""
    progress = CONTEXT.Value("q", -1)
    process = start(train, folder, output, options, progress, None, True, kind)
    wait_for(lambda: progress.value >= step or not process.is_alive())
    time.sleep(rng.random() * 0.005)
    process.kill()
    return finish(process)


class KillAt:
    """Kills this process, or another, when an iteration begins."""

    def __init__(self, step, number=signal.SIGKILL):
        self.step = step
        self.number = number

    def __call__(self, trainer):
        if trainer.iter == self.step:
            os.kill(os.getpid(), self.number)
