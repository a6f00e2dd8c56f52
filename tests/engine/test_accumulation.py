"""Gradients of a batch in parts are those of the whole batch."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from d2kit.engine import AMPTrainer, HookBase, SimpleTrainer, launch
from d2kit.engine.trainers import check_accumulation
from d2kit.utils import comm
from tests.support import tiny_run as tiny

SCALE = 64.0


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(3, 1)
        self.sizes = []

    def forward(self, batch):
        self.sizes.append(len(batch))
        out = self.fc(torch.stack([x for x, _ in batch]))[:, 0].float()
        residual = out - torch.stack([y for _, y in batch])
        return {"square": residual.square().mean(), "abs": residual.abs().mean()}


def batches(size=8):
    generator = torch.Generator().manual_seed(1)
    while True:
        yield [
            (torch.randn(3, generator=generator), torch.randn((), generator=generator))
            for _ in range(size)
        ]


class Gradients(HookBase):
    def __init__(self):
        self.values = []

    def after_backward(self):
        self.values.append(self.trainer.model.fc.weight.grad.clone())


def train(steps, kind=SimpleTrainer, **kwargs):
    model, seen = Line(), Gradients()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    if kwargs.get("precision") is torch.float16:  # the usual 65536 would overflow here
        kwargs["grad_scaler"] = torch.amp.GradScaler("cpu", init_scale=SCALE)
    trainer = kind(model, batches(), optimizer, accumulate_steps=steps, **kwargs)
    trainer.register_hooks([seen])
    trainer.train(0, 4)
    return trainer, seen.values


@pytest.mark.parametrize("zero_first", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("kind", "kwargs", "tolerance"),
    [
        (SimpleTrainer, {}, 1e-5),
        (AMPTrainer, {"precision": torch.float16}, 1e-2),
        (AMPTrainer, {"precision": torch.bfloat16}, 3e-2),
    ],
)
def test_parts_give_the_gradients_and_losses_of_the_whole(
    kind, kwargs, tolerance, steps, zero_first
):
    whole, expected = train(1, kind, **kwargs)
    parts, found = train(steps, kind, zero_grad_before_forward=zero_first, **kwargs)
    assert parts.model.sizes == [8 // steps] * (4 * steps)
    scale = SCALE if kwargs.get("precision") is torch.float16 else 1.0
    for one, other in zip(expected, found, strict=True):  # one update per batch
        assert torch.allclose(one / scale, other / scale, rtol=tolerance, atol=tolerance)
    assert torch.allclose(parts.model.fc.weight, whole.model.fc.weight, atol=tolerance)
    for name in ("square", "total_loss"):
        values = [[v for v, _ in t.storage.history(name).values()] for t in (whole, parts)]
        assert values[1] == pytest.approx(values[0], rel=tolerance)


def test_a_batch_that_cannot_be_cut_is_named():
    for batch, message in (([1, 2, 3], "3 entries"), (torch.ones(4), "Tensor")):
        trainer = SimpleTrainer(nn.Linear(1, 1), iter([batch]), None, accumulate_steps=2)
        with pytest.raises(ValueError, match=message):
            trainer.train(0, 1)
    with pytest.raises(ValueError, match="at least 1"):
        SimpleTrainer(nn.Linear(1, 1), None, None, accumulate_steps=0)


def test_parts_with_other_losses_are_named():
    class Moody(Line):
        def forward(self, batch):
            losses = super().forward(batch)
            return losses if len(self.sizes) == 1 else {"square": losses["square"]}

    model = Moody()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="same losses"):
        SimpleTrainer(model, batches(), optimizer, accumulate_steps=2).train(0, 1)


@pytest.mark.parametrize(
    ("images", "processes", "steps", "good"),
    [(16, 2, 4, True), (16, 2, 8, True), (16, 2, 16, False), (6, 1, 4, False), (8, 1, 0, False)],
)
def test_division_is_checked_before_the_data_are_read(images, processes, steps, good):
    if good:
        check_accumulation(images, processes, steps)
    else:
        with pytest.raises(ValueError, match=r"SOLVER\.ACCUMULATE_STEPS"):
            check_accumulation(images, processes, steps)


class QuietTrainer(tiny.TinyTrainer):
    noise = False


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model")
        + ("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.01),
    ],
)
def test_by_config(tmp_path, options):
    (tmp_path / "images").mkdir()
    tiny.register(tmp_path / "images")
    weights = []
    for steps in (1, 2):
        cfg = tiny.tiny_cfg(
            *(tmp_path / str(steps), "SOLVER.ACCUMULATE_STEPS", steps, "SOLVER.IMS_PER_BATCH", 4),
            *("SOLVER.MAX_ITER", 3, *options),
        )
        trainer = QuietTrainer(cfg)
        trainer.resume_or_load(resume=False)
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert torch.allclose(*weights, rtol=1e-4, atol=1e-6)


def two_processes(folder):
    model = DistributedDataParallel(Line())
    rank, exchanged = comm.get_rank(), []

    def count(_, bucket):
        exchanged.append(1)
        done = torch.distributed.all_reduce(bucket.buffer(), async_op=True).get_future()
        return done.then(lambda f: f.value()[0] / comm.get_world_size())

    model.register_comm_hook(None, count)
    own = (batch[4 * rank : 4 * rank + 4] for batch in batches())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    SimpleTrainer(model, own, optimizer, accumulate_steps=4).train(0, 4)
    result = {"weight": model.module.fc.weight.detach(), "exchanged": len(exchanged)}
    torch.save(result, f"{folder}/{rank}.pt")


@pytest.mark.slow
def test_two_processes_exchange_once_per_update_and_agree_with_one(tmp_path):
    launch(two_processes, 0, args=(str(tmp_path),), num_processes=2)
    expected = train(1)[0].model.fc.weight
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found["exchanged"] == 4
        assert torch.allclose(found["weight"], expected, atol=1e-6)
