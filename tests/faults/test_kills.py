"""FAULTS 1, 2, 3, 6, 9, 19: whatever is killed, the run ends as if nothing had happened.

Fails without: `start_loader_at` in `DefaultTrainer.train` (another order of images), the seeding of
each iteration in `TrainerBase._iterate` (other dropout), `SimpleTrainer.state_dict` without the
optimizer (other weights), `PeriodicWriter.state_dict` (other medians in ``metrics.json``),
`JSONWriter.continue_from` (lines twice), `fresh_store` (restarted processes wait for dead ones).
"""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from d2kit.engine import HookBase, launch
from d2kit.engine.hooks import BestCheckpointer, PeriodicCheckpointer
from d2kit.engine.launch import _find_free_port
from d2kit.utils import comm
from tests.support import fault_runs as runs
from tests.support import tiny_run as tiny

ROOT = Path(__file__).parents[2]


@pytest.mark.faults(1, 6)
@pytest.mark.parametrize("workers", [0, 2])
def test_twenty_kills_at_random_moments(folder, workers):
    options = ("SOLVER.MAX_ITER", 200, "SOLVER.CHECKPOINT_PERIOD", 7, "SOLVER.STEPS", (120,))
    options += ("INPUT.CROP.ENABLED", True)
    cfg = tiny.tiny_cfg(folder / "straight", *options)
    assert len(cfg.INPUT.MIN_SIZE_TRAIN) > 1
    assert cfg.DATALOADER.ASPECT_RATIO_GROUPING
    runs.train(folder, "straight", options)
    rng = random.Random(workers)
    killed = 0
    kills = 20 if workers == 0 else 3
    for k in range(kills):
        step = rng.randrange(190 * k // kills, 190 * (k + 1) // kills)
        several = (*options, "DATALOADER.NUM_WORKERS", workers)
        killed += runs.kill_at_random(folder, "run", several, step, rng) == -signal.SIGKILL
    assert killed == kills
    runs.train(folder, "run", options)
    straight, run = folder / "straight", folder / "run"
    assert tiny.final_state(run) == tiny.final_state(straight)
    assert runs.images(run) == runs.images(straight)
    assert len(runs.images(run)) == 200
    lines = runs.metrics(run)
    assert lines == runs.metrics(straight)
    assert len(lines) >= 10


@pytest.mark.faults(2)
def test_other_numbers_of_workers(folder):
    runs.train(folder, "straight")
    for workers, step in ((4, 7), (0, 8), (2, None)):
        options = ("DATALOADER.NUM_WORKERS", workers, "SOLVER.CHECKPOINT_PERIOD", 2)
        act = None if step is None else runs.KillAt(step)
        code = runs.finish(runs.start(runs.train, folder, "run", options, None, act))
        assert code == (0 if step is None else -signal.SIGKILL)
    assert tiny.final_state(folder / "run") == tiny.final_state(folder / "straight")
    assert runs.images(folder / "run") == runs.images(folder / "straight")


@pytest.mark.faults(9)
def test_ten_crashes_with_three_checkpoints_kept(folder):
    class Keeping(tiny.TinyTrainer):
        def build_hooks(self):
            found = super().build_hooks()
            for hook in found:
                if isinstance(hook, PeriodicCheckpointer):
                    hook.max_to_keep = 3
            found.insert(-1, BestCheckpointer(2, self.checkpointer, "total_loss", "min"))
            return found

    class CrashError(Exception):
        pass

    class Crash(HookBase):
        def before_step(self):
            if self.trainer.iter == self.at:
                raise CrashError

    for k in range(11):
        cfg = tiny.tiny_cfg(folder / "run", "SOLVER.MAX_ITER", 23, "SOLVER.CHECKPOINT_PERIOD", 2)
        trainer = Keeping(cfg)
        crash = Crash()
        crash.at = 2 * k + 3
        trainer.register_hooks([crash])
        trainer.resume_or_load(resume=True)
        assert trainer.start_iter == 2 * k
        if crash.at < 23:
            with pytest.raises(CrashError):
                trainer.train()
        else:
            trainer.train()
    names = sorted(path.name for path in (folder / "run").glob("*.pth"))
    assert names[-2:] == ["model_best.pth", "model_final.pth"]
    assert len(names) == 5


def part(folder, steps, period):
    """Train in this process or with another one up to `steps`, as if killed there."""
    options = ("SOLVER.MAX_ITER", 12, "SOLVER.CHECKPOINT_PERIOD", period)
    act = runs.KillAt(steps) if steps else None
    runs.train(folder, "run", options, act=act, noise=False)


@pytest.mark.faults(3)
def test_two_processes_one_two(folder):
    runs.train(folder, "straight", noise=False)
    with pytest.raises(torch.multiprocessing.ProcessExitedException):
        launch(part, 0, args=(str(folder), 5, 4), num_processes=2)
    assert runs.finish(runs.start(part, folder, 9, 4)) == -signal.SIGKILL
    launch(part, 0, args=(str(folder), None, 4), num_processes=2)
    used: dict = {}
    for path in (folder / "run").glob("images*.txt"):
        for line in path.read_text().splitlines():
            iteration, ids = json.loads(line)
            used.setdefault(iteration, []).append(ids)
    straight = runs.images(folder / "straight")
    for iteration, ids in enumerate(straight):
        halves = [x for x in used[iteration] if len(x) < len(ids)]
        wholes = [x for x in used[iteration] if len(x) == len(ids)]
        assert all(x == ids for x in wholes)
        assert all(x[0] in ids for x in halves)
        assert not halves or sorted({x[0] for x in halves}) == sorted(set(ids))
    for (i, ours), (j, theirs) in zip(
        runs.metrics(folder / "run"), runs.metrics(folder / "straight"), strict=True
    ):
        assert i == j
        assert ours == pytest.approx(theirs, rel=1e-5)


def elastic(folder):
    """Run by torchrun: rank 1 kills itself, the first time."""
    mark = Path(folder) / "killed"

    def act(trainer):
        if comm.get_rank() == 1 and trainer.iter == 7 and not mark.exists():
            mark.write_text("")
            os.kill(os.getpid(), signal.SIGKILL)

    runs.train(folder, "run", act=act, noise=False)


def undisturbed(folder):
    runs.train(folder, "straight", noise=False)


@pytest.mark.faults(19)
def test_torchrun_restarts(folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--max-restarts", "3", "--master-port", str(_find_free_port())]
    command += ["-m", "tests.faults.test_kills", str(folder)]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "killed").exists()
    launch(undisturbed, 0, args=(str(folder),), num_processes=2)
    assert tiny.final_state(folder / "run") == tiny.final_state(folder / "straight")
    assert runs.metrics(folder / "run") == runs.metrics(folder / "straight")


if __name__ == "__main__":
    launch(elastic, 1, args=(sys.argv[1],))
