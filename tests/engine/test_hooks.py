import json
import logging
import math

import pytest
import torch
from fvcore.common.param_scheduler import LinearParamScheduler
from torch import nn

from d2kit.checkpoint import DetectionCheckpointer
from d2kit.engine import TrainerBase, hooks
from d2kit.utils.events import EventWriter, JSONWriter


class Counting(TrainerBase):
    """Counts; fails in iteration `fail_at`."""

    def __init__(self, fail_at=None):
        super().__init__()
        self.fail_at = fail_at
        self.optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)

    def run_step(self):
        if self.iter == self.fail_at:
            raise RuntimeError("failed")
        self.optimizer.step()


def train(hook_list, iterations, start=0, **kwargs):
    trainer = Counting(**kwargs)
    trainer.register_hooks(hook_list)
    trainer.train(start, iterations)
    return trainer


@pytest.mark.parametrize(
    ("period", "after_train", "expected"),
    [(0, True, [10]), (4, True, [3, 7, 10]), (5, True, [4, 10]), (4, False, [3, 7])],
)
def test_evaluations_happen_at_intervals_and_once_at_the_end(period, after_train, expected):
    seen = []
    trainer = Counting()

    def evaluate():
        seen.append(trainer.iter)
        return {"bbox": {"AP": len(seen)}}

    trainer.register_hooks([hooks.EvalHook(period, evaluate, after_train)])
    trainer.train(0, 10)
    assert seen == expected
    assert trainer.storage.history("bbox/AP").latest() == len(expected)


def test_no_evaluation_after_a_failure():
    seen = []
    with pytest.raises(RuntimeError, match="failed"):
        train([hooks.EvalHook(0, lambda: seen.append(1))], 3, fail_at=2)
    assert seen == []


@pytest.mark.parametrize(
    ("result", "error"), [([1], "must return a dict"), ({"a": {"b": "x"}}, "a/b='x'")]
)
def test_odd_results_are_refused(result, error):
    with pytest.raises((TypeError, ValueError), match=error):
        train([hooks.EvalHook(0, lambda: result)], 1)


@pytest.mark.parametrize(("mode", "best"), [("max", 5), ("min", 2)])
def test_best_checkpointer_keeps_the_best(tmp_path, mode, best):
    values = iter([3.0, math.nan, 2.0, 5.0, 4.0])
    model = nn.Linear(1, 1)
    trainer = Counting()
    checkpointer = DetectionCheckpointer(model, tmp_path)
    keeper = hooks.BestCheckpointer(2, checkpointer, "bbox/AP", mode)
    trainer.register_hooks([hooks.EvalHook(2, lambda: {"bbox": {"AP": next(values)}}), keeper])
    trainer.train(0, 10)
    at = {3.0: 1, 2.0: 5, 5.0: 7}[best]
    saved = torch.load(tmp_path / "model_best.pth", weights_only=True)
    assert saved["iteration"] == at
    assert (keeper.best_metric, keeper.best_iter) == (best, at)
    other = hooks.BestCheckpointer(2, checkpointer, "bbox/AP", mode)
    other.load_state_dict(keeper.state_dict())
    assert other.best_metric == best


def test_best_checkpointer_after_the_last_iteration_and_its_mistakes(tmp_path, caplog):
    checkpointer = DetectionCheckpointer(nn.Linear(1, 1), tmp_path)
    evaluate = hooks.EvalHook(0, lambda: {"bbox": {"AP": 1}})
    train([evaluate, hooks.BestCheckpointer(0, checkpointer, "bbox/AP")], 4)
    assert torch.load(tmp_path / "model_best.pth", weights_only=True)["iteration"] == 3
    evaluate = hooks.EvalHook(0, lambda: {"bbox": {"AP": 1}})
    train([evaluate, hooks.BestCheckpointer(0, checkpointer, "bbox/ap")], 4)
    assert "evaluations wrote ['bbox/AP']" in caplog.text
    with pytest.raises(ValueError, match="mode"):
        hooks.BestCheckpointer(0, checkpointer, "x", "best")


def test_periodic_checkpointer_as_a_hook(tmp_path):
    checkpointer = DetectionCheckpointer(nn.Linear(1, 1), tmp_path)
    train([hooks.PeriodicCheckpointer(checkpointer, 4)], 10)
    names = sorted(path.stem for path in tmp_path.glob("*.pth"))
    assert names == ["model_0000003", "model_0000007", "model_final"]
    with pytest.raises(ValueError, match="at least 1"):
        hooks.PeriodicCheckpointer(checkpointer, 0)


def test_periodic_writer(tmp_path):
    class Writer(EventWriter):
        writes, closed = [], 0

        def write(self):
            self.writes.append(trainer.iter)

        def close(self):
            self.closed += 1

    writer, trainer = Writer(), Counting()
    trainer.register_hooks([hooks.PeriodicWriter([writer], period=4)])
    trainer.train(0, 10)
    assert writer.writes == [3, 7, 9, 10]
    assert writer.closed == 1
    with pytest.raises(TypeError, match="EventWriter"):
        hooks.PeriodicWriter([print])


def test_results_of_the_last_evaluation_are_written(tmp_path):
    writer = JSONWriter(str(tmp_path / "metrics.json"))
    train([hooks.EvalHook(0, lambda: {"bbox": {"AP": 7}}), hooks.PeriodicWriter([writer])], 3)
    rows = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert rows[-1] == {"iteration": 3, "bbox/AP": 7}


def test_learning_rate_is_recorded_and_stepped():
    trainer = Counting()
    trainer.scheduler = torch.optim.lr_scheduler.StepLR(trainer.optimizer, 2, gamma=0.1)
    trainer.register_hooks([hooks.LRScheduler()])
    trainer.train(0, 5)
    values = [value for value, _ in trainer.storage.history("lr").values()]
    assert values == pytest.approx([1, 1, 0.1, 0.1, 0.01])


def test_a_schedule_of_progress_is_taken_too():
    hook = hooks.LRScheduler(scheduler=LinearParamScheduler(1.0, 0.0))
    trainer = train([hook], 4)
    values = [value for value, _ in trainer.storage.history("lr").values()]
    assert values == pytest.approx([1, 0.75, 0.5, 0.25])
    assert hook.state_dict()["last_epoch"] == 4


def test_the_group_that_says_most_is_recorded():
    def optimizer(*groups):
        made = [
            {"params": [nn.Parameter(torch.zeros(1)) for _ in range(n)], "lr": lr}
            for n, lr in groups
        ]
        return torch.optim.SGD(made)

    best = hooks.LRScheduler.get_best_param_group_id
    assert best(optimizer((1, 0.1), (3, 0.2), (2, 0.3))) == 1
    assert best(optimizer((1, 0.1), (1, 0.2), (1, 0.2))) == 1


def test_timer_skips_the_warmup(caplog):
    with caplog.at_level(logging.INFO):
        trainer = train([hooks.IterationTimer(warmup_iter=2)], 9, start=4)
    assert [i for _, i in trainer.storage.history("time").values()] == [6, 7, 8]
    assert "Trained 5 iterations" in caplog.text


def test_callbacks():
    seen = []
    places = ("before_train", "before_step", "after_step", "after_train")
    functions = {p: (lambda trainer, p=p: seen.append((p, trainer.iter))) for p in places}
    train([hooks.CallbackHook(**functions), hooks.CallbackHook()], 1)
    assert seen == [("before_train", 0), ("before_step", 0), ("after_step", 0), ("after_train", 1)]


def test_precise_bn_sets_the_mean_over_batches():
    model = nn.Sequential(nn.BatchNorm1d(2))
    data = [torch.full((4, 2), float(i)) + torch.arange(4.0)[:, None] for i in range(3)]
    train([hooks.PreciseBN(0, model, data, 3)], 2)
    assert model[0].running_mean.tolist() == pytest.approx([2.5, 2.5])
    idle = hooks.PreciseBN(0, nn.Linear(1, 1), data, 3)
    train([idle], 1)


@pytest.mark.parametrize("tensorboard", [False, True])
def test_profilers_write_a_trace(tmp_path, tensorboard):
    hook = hooks.TorchProfiler(
        lambda trainer: trainer.iter == 1, str(tmp_path), save_tensorboard=tensorboard
    )
    train([hook], 3)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 1
    assert "profiler_iter1" in str(files[0])


def test_autograd_profiler_writes_for_chrome(tmp_path):
    train([hooks.AutogradProfiler(lambda trainer: trainer.iter == 0, str(tmp_path))], 1)
    assert "traceEvents" in json.loads((tmp_path / "profiler_iter0.json").read_text())


def test_memory_stats_need_a_gpu(caplog):
    with caplog.at_level(logging.INFO):
        train([hooks.TorchMemoryStats(1, max_runs=2)], 4)
    expected = 2 if torch.cuda.is_available() else 0
    assert caplog.text.count("CUDA memory") == expected
