import pytest
import torch
from torch import nn

from d2kit.config import get_cfg
from d2kit.solver import build_optimizer, get_default_optimizer_params
from d2kit.solver.build import (
    GradientClipType,
    maybe_add_gradient_clipping,
    reduce_param_groups,
)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1)
        self.norm = nn.BatchNorm2d(2)
        self.head = nn.Linear(2, 2)
        self.tied = self.head
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def named_rules(model, groups):
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        names[id(p)]: {k: v for k, v in group.items() if k != "params"}
        for group in groups
        for p in group["params"]
    }


def solver_cfg(*options):
    cfg = get_cfg()
    cfg.merge_from_list(["SOLVER.BASE_LR", 0.1, *options])
    return cfg


def test_groups_follow_the_rules():
    model = Net()
    groups = get_default_optimizer_params(
        model,
        base_lr=1.0,
        weight_decay=0.1,
        weight_decay_norm=0.0,
        bias_lr_factor=2.0,
        weight_decay_bias=0.01,
        lr_factor_func=lambda name: 0.5 if name.startswith("head") else 1.0,
    )
    rules = named_rules(model, groups)
    assert rules == {
        "conv.weight": {"lr": 1.0, "weight_decay": 0.1},
        "conv.bias": {"lr": 2.0, "weight_decay": 0.01},
        "norm.weight": {"lr": 1.0, "weight_decay": 0.0},
        "norm.bias": {"lr": 2.0, "weight_decay": 0.01},
        "head.weight": {"lr": 0.5, "weight_decay": 0.1},
        "head.bias": {"lr": 2.0, "weight_decay": 0.01},
    }
    assert len(groups) == 4
    assert sum(len(g["params"]) for g in groups) == 6  # the shared layer once, the frozen one not


def test_overrides_win_by_parameter_name():
    model = Net()
    groups = get_default_optimizer_params(model, base_lr=1.0, overrides={"weight": {"lr": 3.0}})
    rules = named_rules(model, groups)
    assert rules["conv.weight"] == {"lr": 3.0}
    assert rules["conv.bias"] == {"lr": 1.0}


def test_without_arguments_there_is_one_group():
    groups = get_default_optimizer_params(Net())
    assert len(groups) == 1
    assert list(groups[0]) == ["params"]


@pytest.mark.parametrize(
    "kwargs",
    [
        {"bias_lr_factor": 2.0},
        {"lr_factor_func": lambda name: 1.0},
        {"weight_decay_bias": 0.1, "overrides": {"bias": {"lr": 1.0}}},
    ],
)
def test_contradictions_are_refused(kwargs):
    with pytest.raises(ValueError, match=r"base_lr|ruled twice"):
        get_default_optimizer_params(Net(), **kwargs)


def test_reduce_keeps_order_and_every_parameter():
    a, b, c = (nn.Parameter(torch.zeros(1)) for _ in range(3))
    groups = reduce_param_groups(
        [{"params": [a], "lr": 1}, {"params": [b], "lr": 2}, {"params": [c], "lr": 1}]
    )
    assert [group["lr"] for group in groups] == [1, 2]
    assert groups[0]["params"][0] is a
    assert groups[0]["params"][1] is c


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_named_optimizer_is_built_and_fused(name):
    optimizer = build_optimizer(solver_cfg("SOLVER.OPTIMIZER", name), Net())
    assert type(optimizer) is getattr(torch.optim, name)
    assert optimizer.defaults["fused"] is True
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0001, 0.0}


def test_sgd_step_is_that_of_the_formula():
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    cfg = solver_cfg("SOLVER.MOMENTUM", 0.5, "SOLVER.WEIGHT_DECAY", 0.01, "SOLVER.NESTEROV", True)
    optimizer = build_optimizer(cfg, model)
    weight, velocity = model.weight.detach().clone(), 0
    for _ in range(3):
        model.weight.grad = torch.tensor([[1.0, -2.0]])
        gradient = model.weight.grad + 0.01 * weight
        velocity = 0.5 * velocity + gradient
        weight = weight - 0.1 * (gradient + 0.5 * velocity)
        optimizer.step()
    assert torch.allclose(model.weight, weight, atol=1e-6)


def test_wrong_names_and_frozen_models_are_errors():
    with pytest.raises(ValueError, match="did you mean AdamW"):
        build_optimizer(solver_cfg("SOLVER.OPTIMIZER", "adamww"), Net())
    with pytest.raises(ValueError, match="no trainable parameter"):
        build_optimizer(solver_cfg(), nn.Linear(1, 1).requires_grad_(False))
    clip = ["SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "all"]
    with pytest.raises(ValueError, match="CLIP_TYPE"):
        build_optimizer(solver_cfg(*clip), Net())


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("value", ([1.0, 1.0], [0.5])),
        ("norm", ([0.6, 0.8], [0.5])),
        ("full_model", ([3 / 25.25**0.5, 4 / 25.25**0.5], [0.5 / 25.25**0.5])),
    ],
)
@pytest.mark.parametrize("as_object", [False, True])
def test_gradients_are_clipped(kind, expected, as_object):
    cfg = solver_cfg("SOLVER.CLIP_GRADIENTS.ENABLED", True)
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = GradientClipType(kind).value
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    unused = nn.Parameter(torch.zeros(1))
    params = [a, b, unused]
    if as_object:
        optimizer = torch.optim.SGD(params, lr=1.0)
        assert maybe_add_gradient_clipping(cfg, optimizer) is optimizer
    else:
        optimizer = maybe_add_gradient_clipping(cfg, torch.optim.SGD)(params, lr=1.0)
    a.grad, b.grad = torch.tensor([3.0, 4.0]), torch.tensor([0.5])
    optimizer.step()
    assert torch.allclose(-a.data, torch.tensor(expected[0]), atol=1e-5)
    assert torch.allclose(-b.data, torch.tensor(expected[1]), atol=1e-5)
    assert isinstance(optimizer, torch.optim.SGD)


def test_clipping_is_off_by_default():
    assert maybe_add_gradient_clipping(get_cfg(), torch.optim.SGD) is torch.optim.SGD


def test_lr_factors_of_the_config_reach_their_modules():
    cfg = get_cfg()
    model = nn.ModuleDict(
        {"head": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "headless": Net()}
    )
    cfg.SOLVER.BASE_LR = 2.0
    cfg.SOLVER.LR_FACTORS = [["head", 0.5], ["head.1", 0.25]]
    groups = build_optimizer(cfg, model).param_groups
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    found = {name: rate[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    assert {v for k, v in found.items() if k.startswith("head.0")} == {1.0}
    assert {v for k, v in found.items() if k.startswith("head.1")} == {0.5}
    assert {v for k, v in found.items() if k.startswith("headless")} == {2.0}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([["haed", 0.5]], "names the module 'haed'.*near: head"),
        ([["head", -1.0]], "expected pairs"),
        (["head"], "expected pairs"),
    ],
)
def test_wrong_lr_factors_are_errors(rules, message):
    cfg = get_cfg()
    cfg.SOLVER.LR_FACTORS = rules
    with pytest.raises(ValueError, match=message):
        build_optimizer(cfg, nn.ModuleDict({"head": nn.Linear(2, 2)}))
