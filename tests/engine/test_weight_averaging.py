"""The moving average of the weights: its values, who uses it, where it is kept."""

import pytest
import torch
from torch import nn

from d2kit.checkpoint import DetectionCheckpointer
from d2kit.engine import HookBase, SimpleTrainer, WeightAveraging
from tests.support import tiny_run as tiny


class Weights(HookBase):
    """Remembers the weights after each iteration."""

    def __init__(self):
        self.values = []

    def after_step(self):
        state = self.trainer.model.state_dict()
        self.values.append({name: value.clone() for name, value in state.items()})


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2)

    def forward(self, batch):
        return self.norm(self.fc(batch)).square().mean() + self.fc.weight.sum()


def train(hook_of, steps):
    model, weights = Normed(), Weights()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(3)
    loader = (torch.randn(4, 2, generator=generator) for _ in range(99))
    trainer = SimpleTrainer(model, loader, torch.optim.SGD(model.parameters(), lr=0.1))
    hook = hook_of(model)
    trainer.register_hooks([hook, weights])
    trainer.train(0, steps)
    return model, hook, [start, *weights.values]


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("steps", [1, 4])
def test_average_is_that_of_the_formula(decay, warmup, steps):
    _, hook, history = train(lambda m: WeightAveraging(m, decay, warmup=warmup), steps)
    expected = {name: x.double() for name, x in history[0].items()}
    for t, weights in enumerate(history[1:]):
        d = min(decay, (1 + t) / (10 + t)) if warmup else decay
        expected = {k: d * expected[k] + (1 - d) * x.double() for k, x in weights.items()}
    found = hook.state_dict()["average"]
    assert found["norm.num_batches_tracked"] == steps  # integers are copied
    for name in set(found) - {"norm.num_batches_tracked"}:
        assert torch.allclose(found[name].double(), expected[name], atol=1e-6), name


def test_the_model_gets_its_own_weights_back_also_after_an_error():
    model, hook, history = train(lambda m: WeightAveraging(m, 0.9), 3)
    pointers = [p.data_ptr() for p in model.parameters()]
    with hook.averaged():
        assert torch.equal(model.fc.weight, hook.state_dict()["average"]["fc.weight"])
        assert not torch.equal(model.fc.weight, history[-1]["fc.weight"])
    with pytest.raises(IndexError), hook.averaged():
        model.fc.weight[99]
    assert all(torch.equal(value, history[-1][k]) for k, value in model.state_dict().items())
    assert pointers == [p.data_ptr() for p in model.parameters()]  # the optimizer still has them


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5])
def test_decay_is_checked(decay):
    with pytest.raises(ValueError, match=r"SOLVER\.EMA\.DECAY"):
        WeightAveraging(nn.Linear(1, 1), decay)


def test_the_average_of_another_model_is_refused():
    _, hook, _ = train(lambda m: WeightAveraging(m, 0.9), 1)
    for other in (nn.Linear(2, 2), nn.Sequential(nn.Linear(1, 1))):
        with pytest.raises(ValueError, match="another model"):
            WeightAveraging(other, 0.9).load_state_dict(hook.state_dict())


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    tiny.register(folder)
    return folder


class EvaluatedTrainer(tiny.TinyTrainer):
    """Its evaluation remembers what it was given."""

    seen = None

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        cls.seen = model.head.weight.detach().clone()
        return {}


def ema_trainer(output, *options, enabled=True):
    switch = ("SOLVER.EMA.ENABLED", enabled, "SOLVER.EMA.DECAY", 0.5, "SOLVER.MAX_ITER", 4)
    return EvaluatedTrainer(tiny.tiny_cfg(output, *switch, *options))


def test_evaluation_and_the_file_have_the_average_and_the_checkpoint_both(tmp_path, images):
    trainer = ema_trainer(tmp_path / "run")
    trainer.train()
    saved = torch.load(tmp_path / "run" / "model_final.pth", weights_only=True)
    average = saved["trainer"]["hooks"]["WeightAveraging"]["average"]["head.weight"]
    assert torch.equal(EvaluatedTrainer.seen, average)
    assert not torch.equal(average, saved["model"]["head.weight"])
    assert torch.equal(trainer.model.head.weight, saved["model"]["head.weight"])
    other = tiny.TinyModel()
    DetectionCheckpointer(other).load(str(tmp_path / "run" / "model_final_ema.safetensors"))
    assert torch.equal(other.head.weight, average)


def test_off_by_default(tmp_path, images):
    trainer = ema_trainer(tmp_path / "run", enabled=False)
    trainer.train()
    assert torch.equal(EvaluatedTrainer.seen, trainer.model.head.weight)
    assert not list((tmp_path / "run").glob("*ema*"))


def test_switched_on_in_the_middle_it_starts_from_the_weights(tmp_path, images):
    ema_trainer(tmp_path / "run", "SOLVER.MAX_ITER", 2, enabled=False).train()
    trainer = ema_trainer(tmp_path / "run", "SOLVER.MAX_ITER", 2, "RESUME_CHANGED", True)
    trainer.resume_or_load(resume=True)
    trainer.train()  # nothing is left to do
    assert torch.equal(EvaluatedTrainer.seen, trainer.model.head.weight)
