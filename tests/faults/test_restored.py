"""FAULTS 4, 5: everything that a run remembers is restored, whenever it is killed.

Fails without: `state_dict` of `AMPTrainer` (the scale starts anew), of `WeightAveraging`, of
`EarlyStopping` or `BestCheckpointer`, `repeat_missed_evaluation` (one metric less to choose by),
the glob of `PeriodicCheckpointer` (files of earlier lives are kept for ever).
"""

import os
import random
import signal

import pytest
import torch

from d2kit.engine.hooks import PeriodicCheckpointer
from tests.support import fault_runs as runs
from tests.support import tiny_run as tiny

SWITCHES = (
    *("SOLVER.MAX_ITER", 200, "SOLVER.CHECKPOINT_PERIOD", 4, "SOLVER.STEPS", (30,)),
    *("SOLVER.ACCUMULATE_STEPS", 2, "SOLVER.EMA.ENABLED", True, "SOLVER.EMA.DECAY", 0.7),
    *("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "float16"),
    *("TEST.EVAL_PERIOD", 3, "TEST.BEST_METRIC", "bbox/AP"),
    *("SOLVER.EARLY_STOPPING.PATIENCE", 6),
)


class FallingTrainer(tiny.TinyTrainer):
    """Its metric grows until iteration 42; it keeps three checkpoints."""

    @classmethod
    def build_model(cls, cfg):
        model = super().build_model(cfg)
        model.register_buffer("parts", torch.zeros((), dtype=torch.int64))

        def count(module, _):
            if module.training:
                module.parts += 1

        model.register_forward_pre_hook(count)
        return model

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        return {"bbox": {"AP": 100.0 - abs(42 - int(model.parts) / 2)}}

    def build_hooks(self):
        found = super().build_hooks()
        for hook in found:
            if isinstance(hook, PeriodicCheckpointer):
                hook.max_to_keep = 3
        return found


@pytest.mark.faults(5)
def test_everything_is_restored(folder):
    """Early stopping ends it after iteration 60; the kills come at random before that."""
    runs.train(folder, "straight", SWITCHES, kind=FallingTrainer)
    rng = random.Random(5)
    kills = 8
    killed = 0
    for k in range(kills):
        step = rng.randrange(56 * k // kills, 56 * (k + 1) // kills)
        code = runs.kill_at_random(folder, "run", SWITCHES, step, rng, FallingTrainer)
        killed += code == -signal.SIGKILL
    assert killed == kills
    runs.train(folder, "run", SWITCHES, kind=FallingTrainer)
    straight, run = folder / "straight", folder / "run"
    files = sorted(path.name for path in straight.glob("*.pth"))
    assert files[3:] == ["model_best.pth", "model_final.pth"]
    assert sorted(path.name for path in run.glob("*.pth")) == files
    for name in files:
        one, other = (torch.load(x / name, weights_only=True) for x in (straight, run))
        for part in ("model", "trainer", "iteration"):
            assert tiny.digest(one[part]) == tiny.digest(other[part]), (name, part)
    state = torch.load(run / "model_final.pth", weights_only=True)
    assert state["iteration"] == 59
    assert torch.load(run / "model_best.pth", weights_only=True)["iteration"] == 41
    assert state["trainer"]["_trainer"]["grad_scaler"]["_growth_tracker"] == 60
    hooks = state["trainer"]["hooks"]
    assert {"LRScheduler", "WeightAveraging", "EarlyStopping", "BestCheckpointer"} <= set(hooks)


class KillBetweenParts:
    """Kills this process when the second part of a batch of an iteration is about to be fed."""

    def __init__(self, step):
        self.step = step

    def __call__(self, trainer):
        if trainer.iter != self.step:
            return
        parts = []

        def count(module, inputs):
            parts.append(len(inputs[0]))
            if parts == [1, 1]:
                os.kill(os.getpid(), signal.SIGKILL)

        trainer.model.register_forward_pre_hook(count)


@pytest.mark.faults(4)
def test_kills_inside_gradient_accumulation(folder):
    """The gradients of the first part are lost, and computed again."""
    options = ("SOLVER.ACCUMULATE_STEPS", 2, "SOLVER.CHECKPOINT_PERIOD", 1)
    runs.train(folder, "straight", options)
    for step in (3, 8):
        process = runs.start(runs.train, folder, "run", options, None, KillBetweenParts(step))
        assert runs.finish(process) == -signal.SIGKILL
        newest = max(path.name for path in (folder / "run").glob("model_0*.pth"))
        assert newest == f"model_{step - 1:07d}.pth"
    runs.train(folder, "run", options)
    assert tiny.final_state(folder / "run") == tiny.final_state(folder / "straight")
    assert runs.images(folder / "run") == runs.images(folder / "straight")
