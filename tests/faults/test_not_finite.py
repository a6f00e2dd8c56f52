"""FAULTS 21: a loss that is not finite on one of two processes.

Fails without: the `all_reduce` of `StepMetrics` (rank 0 goes on), `StatisticsKeeper.restore` (the
statistics of BatchNorm are those of the failed step), `_dump` (nothing to replay).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from d2kit.engine import CallbackHook, launch
from d2kit.utils import comm
from tests.support import tiny_run as tiny

ROOT = Path(__file__).parents[2]
IMAGES = "D2KIT_TEST_IMAGES"


class PoisonedTrainer(tiny.TinyTrainer):
    """Its model says NaN to image 4."""

    @classmethod
    def build_model(cls, cfg):
        model = super().build_model(cfg)
        model.poison = {4}
        return model


if IMAGES in os.environ:  # imported by tools/replay.py
    tiny.register(Path(os.environ[IMAGES]))


def fail(folder):
    """Train until image 4 comes; write what was seen."""
    folder = Path(folder)
    tiny.register(folder / "images")
    trainer = PoisonedTrainer(tiny.tiny_cfg(folder / "run"))
    model = getattr(trainer.model, "module", trainer.model)
    before = {}

    def keep(trainer):
        before.update({k: v.clone() for k, v in model.state_dict().items()})

    trainer.register_hooks([CallbackHook(before_step=keep)])
    error = None
    try:
        trainer.train()
    except FloatingPointError as found:
        error = found
    facts = {
        "iteration": trainer.iter,
        "error": str(error),
        "equal": all(torch.equal(v, before[k]) for k, v in model.state_dict().items()),
    }
    (folder / f"facts{comm.get_rank()}.json").write_text(json.dumps(facts))


def replay(folder, dump):
    command = [sys.executable, str(ROOT / "tools" / "replay.py"), str(dump)]
    command += ["--trainer", "tests.faults.test_not_finite:PoisonedTrainer"]
    env = {**os.environ, IMAGES: str(folder / "images"), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=600, env=env, check=False
    )


@pytest.mark.faults(21)
def test_all_ranks_stop_at_the_same_step_which_can_be_replayed(folder):
    launch(fail, 0, args=(str(folder),), num_processes=2)
    facts = [json.loads((folder / f"facts{rank}.json").read_text()) for rank in (0, 1)]
    assert facts[0] == facts[1]
    assert facts[0]["equal"]
    step = facts[0]["iteration"]
    dump = folder / "run" / f"failed_step_{step:07d}"
    written = json.loads((dump / "failure.json").read_text())
    assert written["iteration"] == step
    bad = [rank for rank in written["ranks"] if rank["losses"]["loss_box"] == "nan"]
    assert [rank["images"] for rank in bad] == [[4]]
    assert written["learning_rates"][0] > 0
    done = replay(folder, dump)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = json.loads(done.stdout.splitlines()[-2])
    for now, then in zip(losses, written["ranks"], strict=True):
        for name, value in then["losses"].items():
            assert now[name] == pytest.approx(float(value), rel=1e-5, nan_ok=True)
    assert "the step fails again" in done.stdout


@pytest.mark.faults(21, fast=True)
def test_one_process(folder):
    fail(folder)
    facts = json.loads((folder / "facts0.json").read_text())
    assert facts["equal"]
    assert "failed_step" in str(next((folder / "run").glob("failed_step_*/state.pth")))
    again = tiny.TinyTrainer(tiny.tiny_cfg(folder / "run"))
    again.resume_or_load()
    assert again.start_iter % 6 == 0  # the dump is no checkpoint to resume from
