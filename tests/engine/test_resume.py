import json
import logging
import signal
import subprocess
import sys

import pytest
import torch

from d2kit.engine import CallbackHook, hooks
from tests.support import tiny_run as tiny


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    tiny.register(folder)
    return folder


class KilledError(Exception):
    pass


def run(output, *options, resume=False, kill_at=None, hook=None):
    """Train; stop before iteration `kill_at`, with nothing saved but the checkpoints so far."""

    def kill(trainer):
        if trainer.iter == kill_at:
            raise KilledError

    trainer = tiny.EvaluatedTrainer(tiny.tiny_cfg(output, *options))
    trainer.register_hooks([CallbackHook(before_step=kill), hook])
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def losses(output):
    rows = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    return {row["iteration"]: row["total_loss"] for row in rows if "total_loss" in row}


SWITCHES = {
    "plain": (),
    "accumulation": ("SOLVER.ACCUMULATE_STEPS", 2),
    "accumulation, bfloat16": ("SOLVER.ACCUMULATE_STEPS", 2, "SOLVER.AMP.ENABLED", True)
    + ("SOLVER.AMP.PRECISION", "bfloat16"),
    "validation loss": ("TEST.EVAL_PERIOD", 2, "TEST.VALIDATION_LOSS", True)
    + ("DATASETS.TEST", (tiny.NAME,), "INPUT.MIN_SIZE_TEST", tiny.SIZE)
    + ("TEST.BEST_METRIC", "validation/total_loss"),
    "frozen parts": ("MODEL.FREEZE", ["conv", "norm"]),
    "best and early": ("TEST.EVAL_PERIOD", 2, "TEST.BEST_METRIC", "bbox/AP")
    + ("SOLVER.EARLY_STOPPING.PATIENCE", 4),
    "average of the weights": ("SOLVER.EMA.ENABLED", True, "SOLVER.EMA.DECAY", 0.7),
}
"""What may be switched on without a resumed run ending elsewhere."""


@pytest.mark.faults(1, 5, fast=True)
@pytest.mark.parametrize(
    ("workers", "switch"), [(2, "plain"), *((0, name) for name in SWITCHES)], ids=str
)
def test_a_resumed_run_ends_bitwise_equal(tmp_path, images, workers, switch):
    run(tmp_path / "straight", *SWITCHES[switch])
    options = ("DATALOADER.NUM_WORKERS", workers, *SWITCHES[switch])
    with pytest.raises(KilledError):
        run(tmp_path / "killed", *options, kill_at=8)
    torch.rand(17)  # the state of the process must not matter
    trainer = run(tmp_path / "killed", *options, resume=True)
    assert trainer.start_iter == 6
    assert tiny.final_state(tmp_path / "killed") == tiny.final_state(tmp_path / "straight")
    last = losses(tmp_path / "straight")
    assert last == {k: v for k, v in losses(tmp_path / "killed").items() if k in last}


@pytest.mark.faults(4, fast=True)
def test_a_kill_between_the_parts_of_a_batch(tmp_path, images):
    """The gradients of the first part are lost, and computed again."""
    options = SWITCHES["accumulation"]
    run(tmp_path / "straight", *options)
    trainer = tiny.TinyTrainer(tiny.tiny_cfg(tmp_path / "killed", *options))
    parts = []

    def count(module, inputs):
        parts.append(len(inputs[0]))
        if len(parts) == 16:  # the second part of iteration 7
            raise KilledError

    trainer.model.register_forward_pre_hook(count)
    with pytest.raises(KilledError):
        trainer.train()
    assert parts == [1] * 16
    assert trainer.iter == 7
    assert run(tmp_path / "killed", *options, resume=True).start_iter == 6
    assert tiny.final_state(tmp_path / "killed") == tiny.final_state(tmp_path / "straight")


def test_another_seed_ends_elsewhere(tmp_path, images):
    run(tmp_path / "a", "SOLVER.MAX_ITER", 3)
    run(tmp_path / "b", "SOLVER.MAX_ITER", 3, "SEED", 4)
    assert tiny.final_state(tmp_path / "a") != tiny.final_state(tmp_path / "b")


def test_kill_minus_nine_and_a_drawn_seed(tmp_path, images, caplog):
    output = tmp_path / "run"
    command = [sys.executable, "-m", "tests.support.killed_run", str(images), str(output), "7"]
    done = subprocess.run(command, capture_output=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    with caplog.at_level(logging.INFO):
        trainer = run(output, "SEED", -1, resume=True)
    seed = torch.load(output / "model_0000005.pth", weights_only=True)["trainer"]["seed"]
    assert trainer.cfg.SEED == trainer.seed == seed
    run(tmp_path / "straight", "SEED", seed)
    assert tiny.final_state(output) == tiny.final_state(tmp_path / "straight")


def test_a_damaged_newest_checkpoint_costs_one_period(tmp_path, images, caplog):
    run(tmp_path / "straight", "SOLVER.CHECKPOINT_PERIOD", 3)
    with pytest.raises(KilledError):
        run(tmp_path / "killed", "SOLVER.CHECKPOINT_PERIOD", 3, kill_at=8)
    newest = tmp_path / "killed" / "model_0000005.pth"
    newest.write_bytes(newest.read_bytes()[:-100])
    trainer = run(tmp_path / "killed", "SOLVER.CHECKPOINT_PERIOD", 3, resume=True)
    assert trainer.start_iter == 3
    assert "model_0000005.pth" in caplog.text
    assert tiny.final_state(tmp_path / "killed") == tiny.final_state(tmp_path / "straight")


def test_resume_without_checkpoint_starts_and_a_finished_run_only_evaluates(tmp_path, images):
    evaluations = []
    for expected_start in (0, 4):
        hook = hooks.EvalHook(0, lambda: evaluations.append(1))
        trainer = run(tmp_path / "run", "SOLVER.MAX_ITER", 4, resume=True, hook=hook)
        assert trainer.start_iter == expected_start
    assert len(evaluations) == 2
    longer = run(tmp_path / "run", "SOLVER.MAX_ITER", 6, resume=True)
    assert longer.start_iter == 4


def test_hook_states_travel(tmp_path, images):
    class Count(hooks.HookBase):
        def __init__(self):
            self.steps = 0

        def after_step(self):
            self.steps += 1

        def state_dict(self):
            return {"steps": self.steps}

        def load_state_dict(self, state):
            self.steps = state["steps"]

    first, second = Count(), Count()
    trainer = tiny.TinyTrainer(tiny.tiny_cfg(tmp_path / "run", "SOLVER.MAX_ITER", 5))
    trainer._hooks.insert(0, first)  # before the checkpointer
    trainer.train()
    run(tmp_path / "run", "SOLVER.MAX_ITER", 8, resume=True, hook=second)
    assert (first.steps, second.steps) == (5, 8)
