import itertools
import logging
import os
import signal

import pytest
import torch
from torch import nn

from d2kit.checkpoint import DetectionCheckpointer
from d2kit.engine import AMPTrainer, HookBase, SimpleTrainer, TrainerBase
from d2kit.engine.hooks import EvalHook, Preemption
from d2kit.utils.events import EventStorage, get_event_storage
from d2kit.utils.stopping import leave_if_asked


class Regression(nn.Module):
    """Loss (w x - y)^2 split into two parts."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.5, -0.5]))

    def forward(self, batch):
        x, y = batch
        residual = self.w * x - y
        return {"a": residual[0].square(), "b": residual[1].square()}


def batches(count=None):
    for i in itertools.count() if count is None else range(count):
        yield torch.tensor([1.0 + i % 3, 2.0]), torch.tensor([1.0, i % 2])


def make(kind=SimpleTrainer, model=None, loader=None, **kwargs):
    model = model or Regression()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    return kind(model, batches() if loader is None else loader, optimizer, **kwargs)


class Recorder(HookBase):
    def __init__(self, seen, name):
        self.seen, self.name = seen, name

    def _record(self, place):
        self.seen.append((self.name, place, self.trainer.iter))

    def before_train(self):
        self._record("before_train")

    def after_train(self):
        self._record("after_train")

    def before_step(self):
        self._record("before_step")

    def after_backward(self):
        self._record("after_backward")

    def after_step(self):
        self._record("after_step")


class Losses(HookBase):
    def __init__(self):
        self.values = []

    def after_step(self):
        self.values.append(get_event_storage().latest()["total_loss"][0])


def test_losses_are_those_of_the_formula():
    """Eight steps of momentum SGD by hand."""
    trainer, losses = make(), Losses()
    trainer.register_hooks([losses])
    trainer.train(0, 8)
    w, velocity, expected = torch.tensor([0.5, -0.5]), torch.zeros(2), []
    for x, y in batches(8):
        residual = w * x - y
        expected.append(residual.square().sum().item())
        velocity = 0.9 * velocity + 2 * residual * x
        w = w - 0.02 * velocity
    assert losses.values == pytest.approx(expected, rel=1e-5)
    assert torch.allclose(trainer.model.w, w, rtol=1e-5)
    assert trainer.storage.history("a").values()[0] == (pytest.approx(0.25), 0)


@pytest.mark.parametrize(
    "kwargs", [{"zero_grad_before_forward": True}, {"async_write_metrics": True}]
)
def test_options_do_not_change_the_numbers(kwargs):
    plain, other = make(), make(**kwargs)
    plain.train(0, 8)
    other.train(0, 8)
    assert torch.equal(plain.model.w, other.model.w)
    histories = [t.storage.history("total_loss").values() for t in (plain, other)]
    assert histories[0] == histories[1]


def test_gather_metric_period_writes_less():
    trainer = make(gather_metric_period=4)
    trainer.train(0, 8)
    assert [i for _, i in trainer.storage.history("total_loss").values()] == [3, 7]


def test_hooks_are_called_in_order():
    seen = []
    trainer = make()
    trainer.register_hooks([Recorder(seen, "x"), None, Recorder(seen, "y")])
    trainer.train(3, 5)
    places = ["before_step", "after_backward", "after_step"]
    expected = [("before_train", 3)]
    expected += [(place, i) for i in (3, 4) for place in places]
    expected += [("after_train", 5)]
    assert seen == [(name, place, i) for place, i in expected for name in ("x", "y")]


def test_after_train_is_called_after_a_failure(caplog):
    seen = []
    trainer = make(loader=batches(2))
    trainer.register_hooks([Recorder(seen, "x")])
    with pytest.raises(ValueError, match="must be infinite"):
        trainer.train(0, 5)
    assert seen[-1] == ("x", "after_train", 2)
    assert "stopped in iteration 2" in caplog.text


def test_a_signal_in_an_evaluation_ends_any_trainer_with_the_last_step_saved(tmp_path):
    def evaluate():
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):
            leave_if_asked()
        raise AssertionError("nobody looked")

    trainer = make()
    checkpointer = DetectionCheckpointer(trainer.model, tmp_path, trainer=trainer)
    trainer.register_hooks([EvalHook(3, evaluate), Preemption(checkpointer)])
    with pytest.raises(SystemExit) as left:
        trainer.train(0, 9)
    assert left.value.code == 128 + signal.SIGTERM
    assert [path.name for path in tmp_path.glob("*.pth")] == ["model_0000002.pth"]
    leave_if_asked()  # nothing is asked any more


def test_wrong_use_is_named():
    with pytest.raises(TypeError, match="HookBase"):
        make().register_hooks([print])
    with pytest.raises(NotImplementedError, match="run_step"):
        TrainerBase().train(0, 1)
    trainer = make()
    trainer.model.eval()
    with pytest.raises(ValueError, match="eval mode"):
        trainer.train(0, 1)
    with pytest.raises(ValueError, match="no data_loader"):
        SimpleTrainer(Regression(), None, None).train(0, 1)


class SometimesNan(Regression):
    def forward(self, batch):
        losses = super().forward([(s["x"], s["y"]) for s in batch][0])
        if batch[0]["image_id"] == 2:
            losses["b"] = losses["b"] * float("nan")
        return losses


def samples():
    for i, (x, y) in enumerate(batches()):
        yield [{"image_id": i, "x": x, "y": y}]


def test_nan_stops_before_the_weights_change():
    healthy = make(model=SometimesNan(), loader=samples())
    healthy.train(0, 2)
    trainer = make(model=SometimesNan(), loader=samples(), gather_metric_period=10)
    with pytest.raises(FloatingPointError) as error:
        trainer.train(0, 5)
    text = str(error.value)
    assert "iteration 2" in text
    assert "images [2]" in text
    assert "b=nan" in text
    assert "<- b" in text
    assert torch.equal(trainer.model.w, healthy.model.w)


def test_late_nan_stops_before_a_checkpoint_is_made():
    trainer = make(model=SometimesNan(), loader=samples(), async_write_metrics=True)
    trainer.train(0, 3 - 1)
    with pytest.raises(FloatingPointError, match="iteration 2"):
        trainer.train(2, 5)
    trainer = make(model=SometimesNan(), loader=samples(), async_write_metrics=True)
    with EventStorage():
        for trainer.iter in range(3):
            trainer.run_step()
        with pytest.raises(FloatingPointError, match="resume from the last checkpoint"):
            trainer.state_dict()


def test_state_restores_the_optimizer():
    straight, first, second = make(), make(), make()
    straight.train(0, 8)
    first.train(0, 4)
    second.load_state_dict(first.state_dict())
    second.model.load_state_dict(first.model.state_dict())
    second.data_loader = itertools.islice(batches(), 4, None)
    assert second.iter == 3
    second.train(4, 8)
    assert torch.equal(second.model.w, straight.model.w)


def test_states_of_equal_hooks_are_kept_apart_and_unknown_ones_named(caplog):
    class Stateful(HookBase):
        def __init__(self, value):
            self.value = value

        def state_dict(self):
            return {"value": self.value}

        def load_state_dict(self, state):
            self.value = state["value"]

    first, second = make(), make()
    first.register_hooks([Stateful(1), Stateful(2), HookBase()])
    twins = [Stateful(0), Stateful(0)]
    second.register_hooks(twins)
    state = first.state_dict()
    assert len(state["hooks"]) == 2
    second.load_state_dict(state)
    assert [hook.value for hook in twins] == [1, 2]
    with caplog.at_level(logging.WARNING):
        make().load_state_dict(state)
    assert "no such hook" in caplog.text


def test_seed_makes_steps_independent_of_the_process():
    class Noisy(Regression):
        def forward(self, batch):
            return {k: v * torch.rand(()) for k, v in super().forward(batch).items()}

    results = []
    for disturbance in (0, 5):
        trainer = make(model=Noisy())
        trainer.seed = 1
        torch.rand(disturbance)
        trainer.train(0, 4)
        results.append(trainer.model.w.detach())
    assert torch.equal(*results)


def test_reset_data_loader():
    trainer = make(loader=batches(1))
    trainer.train(0, 1)
    trainer.reset_data_loader(batches)
    trainer.train(1, 3)
    assert trainer.iter == 3


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_mixed_precision_trains_and_restores_its_scaler(precision):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 1)

        def forward(self, batch):
            out = self.fc(batch[0])
            assert out.dtype == precision
            return (out.float() - batch[1][0]).square().mean()

    torch.manual_seed(0)
    trainer = make(AMPTrainer, model=Net(), precision=precision, log_grad_scaler=True)
    trainer.train(0, 30)
    history = [value for value, _ in trainer.storage.history("total_loss").values()]
    assert history[-1] < history[0]
    assert trainer.grad_scaler.is_enabled() == (precision is torch.float16)
    other = make(AMPTrainer, model=Net(), precision=precision)
    trainer.grad_scaler.update(8.0) if precision is torch.float16 else None
    other.load_state_dict(trainer.state_dict())
    assert other.grad_scaler.state_dict() == trainer.grad_scaler.state_dict()
    assert "[metric]grad_scaler" in trainer.storage.histories()


def test_mixed_precision_needs_one_device():
    with pytest.raises(ValueError, match="one device per process"):
        make(AMPTrainer, model=nn.DataParallel(Regression()))


def test_write_metrics_is_public():
    with EventStorage(7) as storage:
        SimpleTrainer.write_metrics({"x": torch.tensor(2.0), "y": torch.tensor(1.0)}, 0.5, 7, "p/")
        assert storage.latest()["p/total_loss"] == (3.0, 7)
        assert storage.latest()["data_time"] == (0.5, 7)
        with pytest.raises(FloatingPointError, match="x=inf"):
            SimpleTrainer.write_metrics({"x": torch.tensor(float("inf"))}, 0.5, 7)
