"""The best checkpoint and the early end: decisions, files, and the same ones after a kill."""

import math

import pytest
import torch
from torch import nn

from d2kit.checkpoint import DetectionCheckpointer
from d2kit.engine import CallbackHook, EarlyStopping, EvalHook, SimpleTrainer, hooks
from tests.support import tiny_run as tiny


def train(values, *, period=1, steps=None, resume_from=None, **options):
    """Train with evaluations that give `values`, one per iteration."""
    model = nn.Linear(1, 1)
    loader = iter(lambda: torch.ones(1, 1), None)
    trainer = SimpleTrainer(_Loss(model), loader, torch.optim.SGD(model.parameters(), lr=0.1))
    stop = EarlyStopping(period, "bbox/AP", **{"patience": 2, **options})
    evaluate = EvalHook(period, lambda: {"bbox": {"AP": values[trainer.iter]}})
    trainer.register_hooks([evaluate, stop])
    if resume_from:
        stop.load_state_dict(resume_from.state_dict())
    trainer.train(0, steps or len(values) - 1)
    return trainer, stop


class _Loss(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).square().mean()


@pytest.mark.parametrize(
    ("values", "options", "ends_after", "best"),
    [
        ([1, 2, 3, 4, 5, 6], {}, 5, 4),  # the last evaluation is not the hook's
        ([3, 1, 2, 4, 5, 6], {}, 3, 3),
        ([1, 1, 1, 1, 1, 1], {}, 3, 1),
        ([3, 1, 4, 2, 5, 1], {}, 5, 4),
        ([3, 2, 1, 2, 2, 2], {"mode": "min"}, 5, 1),
        ([1, 1.5, 1.9, 3, 3, 3], {"min_delta": 1.0}, 3, 1),
        ([1, math.nan, math.nan, 9, 9, 9], {}, 3, 1),
        ([math.nan, math.inf, 9, 9, 9, 9], {"patience": 1}, 1, None),
        ([1, 1, 1, 1, 1, 1], {"period": 2}, 5, 1),
    ],
)
def test_when_it_ends(values, options, ends_after, best):
    trainer, stop = train(values, **options)
    assert trainer.iter == trainer.max_iter == ends_after
    assert stop.best == best


def test_a_run_that_had_ended_does_nothing_more_unless_it_may():
    _, stop = train([3, 1, 2, 4, 5, 6])
    assert train([7] * 6, resume_from=stop)[0].iter == 0
    assert train([7] * 6, resume_from=stop, patience=3)[0].iter > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "most"}, "'most'"),
        ({"patience": 0}, "PATIENCE"),
        ({"period": 0}, "EVAL_PERIOD"),
        ({"min_delta": -1.0}, "MIN_DELTA"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        train([1, 1], **options)


def test_a_metric_that_nobody_wrote_is_named(caplog):
    model = _Loss(nn.Linear(1, 1))
    loader = iter(lambda: torch.ones(1, 1), None)
    trainer = SimpleTrainer(model, loader, torch.optim.SGD(model.parameters(), lr=0.1))
    trainer.register_hooks([EarlyStopping(1, "segm/AP", 1)])
    trainer.train(0, 3)
    assert trainer.iter == 3
    assert "No value of 'segm/AP'" in caplog.text


# ---- by config


class KilledError(Exception):
    pass


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    tiny.register(folder)
    return folder


class FallingTrainer(tiny.EvaluatedTrainer):
    """Its metric grows until iteration 6, and falls from there."""

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        cls.evaluations.append(int(model.steps))
        return {"bbox": {"AP": 10.0 - abs(6 - int(model.steps))}}

    @classmethod
    def build_model(cls, cfg):
        cls.evaluations = []
        model = super().build_model(cfg)
        model.register_buffer("steps", torch.zeros((), dtype=torch.int64))

        def count(module, _):
            if module.training:
                module.steps += 1

        model.register_forward_pre_hook(count)
        return model


OPTIONS = (
    *("TEST.EVAL_PERIOD", 2, "TEST.BEST_METRIC", "bbox/AP", "SOLVER.EARLY_STOPPING.PATIENCE", 2),
    *("SOLVER.MAX_ITER", 20, "SOLVER.STEPS", (15,), "SOLVER.EMA.ENABLED", True),
)


def run(output, *options, resume=False, kill_at=None):
    def kill(trainer):
        if trainer.iter == kill_at:
            raise KilledError

    trainer = FallingTrainer(tiny.tiny_cfg(output, *OPTIONS, *options))
    trainer.register_hooks([CallbackHook(before_step=kill)])
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def saved(folder, name):
    return torch.load(folder / f"{name}.pth", weights_only=True)


def test_files_and_length_of_a_run_that_ends_early(tmp_path, images):
    trainer = run(tmp_path, "SOLVER.CHECKPOINT_PERIOD", 4)
    assert trainer.iter == 10  # two evaluations, at 8 and 10, were worse than that at 6
    assert FallingTrainer.evaluations == [2, 4, 6, 8, 10]  # the last one not twice
    assert saved(tmp_path, "model_final")["iteration"] == 9
    best = saved(tmp_path, "model_best")
    assert best["iteration"] == 5
    average = best["trainer"]["hooks"]["WeightAveraging"]["average"]["head.weight"]
    other = tiny.TinyModel()
    DetectionCheckpointer(other).load(str(tmp_path / "model_best_ema.safetensors"))
    assert torch.equal(other.head.weight, average)
    again = run(tmp_path, resume=True)
    assert again.iter == 10
    assert FallingTrainer.evaluations == [10]


@pytest.mark.faults(5, fast=True)
@pytest.mark.parametrize("checkpoint_period", [2, 3])
@pytest.mark.parametrize("kill_at", [4, 6, 7, 9])
def test_a_killed_run_decides_the_same(tmp_path, images, kill_at, checkpoint_period):
    options = ("SOLVER.CHECKPOINT_PERIOD", checkpoint_period)
    run(tmp_path / "straight", *options)
    with pytest.raises(KilledError):
        run(tmp_path / "killed", *options, kill_at=kill_at)
    run(tmp_path / "killed", *options, resume=True)
    for name in ("model_final", "model_best"):
        one, other = (saved(tmp_path / folder, name) for folder in ("straight", "killed"))
        for part in ("model", "trainer", "iteration"):
            assert tiny.digest(one[part]) == tiny.digest(other[part])


@pytest.mark.faults(8, fast=True)
def test_resume_takes_the_newest_and_not_the_best(tmp_path, images):
    """The best is of iteration 5, the newest of 7: `model_best.pth` was written before."""
    with pytest.raises(KilledError):
        run(tmp_path, "SOLVER.CHECKPOINT_PERIOD", 4, kill_at=9)
    assert saved(tmp_path, "model_best")["iteration"] == 5
    trainer = FallingTrainer(tiny.tiny_cfg(tmp_path, *OPTIONS))
    trainer.resume_or_load(resume=True)
    assert trainer.checkpointer.resumed_from.endswith("model_0000007.pth")


def test_a_kill_inside_the_evaluation_repeats_it(tmp_path, images, monkeypatch):
    options = ("SOLVER.CHECKPOINT_PERIOD", 2)
    run(tmp_path / "straight", *options)

    def die(cls, cfg, model, evaluators=None):
        if int(model.steps) == 6:
            raise KilledError
        return original(cfg, model)

    original = FallingTrainer.test
    with monkeypatch.context() as patch:
        patch.setattr(FallingTrainer, "test", classmethod(die))
        with pytest.raises(KilledError):
            run(tmp_path / "killed", *options)
    run(tmp_path / "killed", *options, resume=True)
    assert FallingTrainer.evaluations == [6, 8, 10]
    assert tiny.final_state(tmp_path / "killed") == tiny.final_state(tmp_path / "straight")


def test_off_by_default(tmp_path, images):
    trainer = tiny.EvaluatedTrainer(tiny.tiny_cfg(tmp_path))
    kinds = (EarlyStopping, hooks.BestCheckpointer)
    assert not any(isinstance(hook, kinds) for hook in trainer._hooks)
