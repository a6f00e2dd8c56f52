"""The polynomial schedule, and its place in the config."""

import pytest
import torch

from d2kit.config import get_cfg
from d2kit.contrib.deeplab import (
    add_deeplab_config,
    build_lr_scheduler,
)
from d2kit.contrib.deeplab.config import WarmupPolyLR
from d2kit.solver import LRMultiplier


def rates(schedule, optimizer, steps):
    found = []
    for _ in range(steps):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return found


def optimizer():
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 0.1)]
    return torch.optim.SGD(groups)


@pytest.mark.parametrize(
    ("method", "ending"), [("linear", 0.0), ("constant", 0.0), ("linear", 0.25)]
)
def test_formula(method, ending):
    cfg = get_cfg()
    add_deeplab_config(cfg)
    cfg.merge_from_list(
        ["SOLVER.LR_SCHEDULER_NAME", "WarmupPolyLR", "SOLVER.MAX_ITER", 20]
        + ["SOLVER.WARMUP_ITERS", 4, "SOLVER.WARMUP_FACTOR", 0.1]
        + ["SOLVER.WARMUP_METHOD", method, "SOLVER.POLY_LR_CONSTANT_ENDING", ending]
    )
    moved = optimizer()
    schedule = build_lr_scheduler(cfg, moved)
    assert isinstance(schedule, WarmupPolyLR)
    for step, (first, second) in enumerate(rates(schedule, moved, 23)):
        poly = max(1 - step / 20, 0) ** 0.9
        warm = {"linear": 0.1 + 0.9 * step / 4, "constant": 0.1}[method]
        expected = poly * warm if step < 4 else max(poly, ending)
        assert first == pytest.approx(expected)
        assert second == pytest.approx(0.1 * expected)


def test_resume():
    moved, again = optimizer(), optimizer()
    schedule = WarmupPolyLR(moved, 20, warmup_iters=3)
    rates(schedule, moved, 7)
    resumed = WarmupPolyLR(again, 20, warmup_iters=3)
    resumed.load_state_dict(schedule.state_dict())
    again.load_state_dict(moved.state_dict())
    assert rates(resumed, again, 5) == rates(schedule, moved, 5)


def test_others_are_delegated():
    cfg = get_cfg()
    assert isinstance(build_lr_scheduler(cfg, optimizer()), LRMultiplier)
    cfg.SOLVER.LR_SCHEDULER_NAME = "WarmupPoly"
    with pytest.raises(ValueError, match="LR_SCHEDULER_NAME"):
        build_lr_scheduler(cfg, optimizer())


@pytest.mark.parametrize(
    "wrong", [{"warmup_method": "slow"}, {"constant_ending": -0.1}, {"constant_ending": 2}]
)
def test_mistakes_are_named(wrong):
    with pytest.raises(ValueError, match=r"slow|CONSTANT_ENDING"):
        WarmupPolyLR(optimizer(), 20, **wrong)
