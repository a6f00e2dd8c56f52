"""FAULTS 17, 18: the cluster asks a run to stop.

Fails without: `add_preemption` in `DefaultTrainer.train` (the process dies of the signal), the
`all_reduce` of `Preemption` (one process leaves, the other waits for ever), the handler of `_spawn`
(the parent dies of the signal, without its children), `outlive_stop_signals` of the loader's
workers (they die, and the step fails).
"""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from d2kit.engine import CallbackHook, launch
from d2kit.utils import comm
from tests.support import fault_runs as runs
from tests.support import tiny_run as tiny

ROOT = Path(__file__).parents[2]


def newest(output):
    return max(path.name for path in output.glob("model_0*.pth"))


@pytest.mark.faults(17)
@pytest.mark.parametrize(
    ("number", "code", "job"),
    [(signal.SIGTERM, 143, "77"), (signal.SIGUSR1, 138, "77"), (signal.SIGUSR1, 138, "")],
)
def test_a_signal_within_a_step(folder, monkeypatch, number, code, job):
    calls = folder / "calls"
    scontrol = folder / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", job)
    variables = dict(os.environ)
    process = runs.start(stopped, folder, variables, number)
    assert runs.finish(process) == code
    assert newest(folder / "run") == "model_0000007.pth"
    requeued = number == signal.SIGUSR1 and job
    assert (calls.read_text() if calls.exists() else "") == ("requeue 77\n" if requeued else "")
    runs.train(folder, "run")
    runs.train(folder, "straight")
    assert tiny.final_state(folder / "run") == tiny.final_state(folder / "straight")


def stopped(folder, variables, number):
    os.environ.update(variables)
    # twice: SLURM sends SIGTERM after SIGUSR1, and a user is impatient
    first, second = runs.KillAt(7, number), runs.KillAt(7, signal.SIGTERM)
    runs.train(folder, "run", act=lambda trainer: (first(trainer), second(trainer)))


@pytest.mark.faults(17)
def test_a_file_of_an_earlier_training_is_no_checkpoint_of_this_one(folder):
    runs.train(folder, "run", ("SOLVER.CHECKPOINT_PERIOD", 1, "SEED", 5))
    stale = (folder / "run/model_0000007.pth").read_bytes()
    assert runs.finish(runs.start(fresh, folder)) == 143
    assert (folder / "run/model_0000007.pth").read_bytes() != stale
    trainer = tiny.TinyTrainer(tiny.tiny_cfg(folder / "run"))
    trainer.resume_or_load()
    assert trainer.start_iter == 8


def fresh(folder):
    """Train without resuming in a folder that holds another training; stop after iteration 7."""
    tiny.register(folder / "images")
    trainer = tiny.TinyTrainer(tiny.tiny_cfg(folder / "run", "SOLVER.CHECKPOINT_PERIOD", 100))
    stop = runs.KillAt(7, signal.SIGTERM)
    trainer.register_hooks([CallbackHook(before_step=stop)])
    trainer.resume_or_load(resume=False)
    trainer.train()


def stop_a_worker(trainer):
    """Send SIGTERM to the loader's workers and to this process, as `scancel` does."""
    if trainer.iter == 7:
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGTERM)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.faults(17)
def test_workers_leave_a_signal_to_their_process(folder):
    options = ("DATALOADER.NUM_WORKERS", 2)
    process = runs.start(runs.train, folder, "run", options, None, stop_a_worker)
    assert runs.finish(process) == 143
    assert newest(folder / "run") == "model_0000007.pth"


def two(folder, act_on, number):
    """Train in two processes; one of them sends itself a signal."""
    act = runs.KillAt(7, number) if comm.get_rank() == act_on else None
    (Path(folder) / f"pid{comm.get_rank()}").write_text(str(os.getpid()))
    options = ("SOLVER.MAX_ITER", 4000, "SOLVER.CHECKPOINT_PERIOD", 100)
    runs.train(folder, "run", options, act=act, noise=False)


@pytest.mark.faults(18)
def test_one_of_two_processes(folder):
    with pytest.raises(SystemExit) as error:
        launch(two, 0, args=(str(folder), 1, signal.SIGTERM), num_processes=2)
    assert error.value.code == 143
    logs = [path.read_text().splitlines() for path in (folder / "run").glob("images*.txt")]
    last = [json.loads(lines[-1])[0] for lines in logs]
    assert len(last) == 2
    assert last[0] == last[1] <= 8
    assert newest(folder / "run") == f"model_{last[0]:07d}.pth"


@pytest.mark.faults(18)
def test_the_parent_of_two_processes(folder):
    code = "import sys; from tests.faults.test_signals import *\n" + (
        "if __name__ == '__main__': launch(two, 0, args=(sys.argv[1], -1, 0), num_processes=2)"
    )
    script = folder / "script.py"
    script.write_text(code)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, str(script), str(folder)], env=env)
    runs.wait_for(lambda: len(list((folder / "run").glob("images*.txt"))) == 2)
    process.terminate()
    assert process.wait(600) == 143
    assert list((folder / "run").glob("model_0*.pth"))
    for rank in (0, 1):
        pid = int((folder / f"pid{rank}").read_text())
        runs.wait_for(lambda pid=pid: not Path(f"/proc/{pid}").exists())
