"""What MODEL.FREEZE freezes, and that it stays as it is in training."""

import copy

import pytest
import torch
from torch import nn

from d2kit.modeling import build_model
from d2kit.modeling.meta_arch.build import freeze_by_pattern
from tests.support.tiny_dense import tiny_dense_config


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.body = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Conv2d(4, 1, 1)

    def forward(self, x):
        return self.head(self.body(self.stem(x)))


STEM = {"stem.0.weight", "stem.0.bias", "stem.1.weight", "stem.1.bias"}


@pytest.mark.parametrize(
    ("patterns", "frozen", "norms"),
    [
        ([], set(), set()),
        (["stem"], STEM, {"stem.1"}),
        (["stem.*"], STEM, {"stem.1"}),
        (["st*.1"], {"stem.1.weight", "stem.1.bias"}, {"stem.1"}),
        (["stem.1.weight"], {"stem.1.weight"}, set()),
        (
            ["stem.1.weight", "*.1.bias"],
            {"stem.1.weight", "stem.1.bias", "body.1.bias"},
            {"stem.1"},
        ),
        (
            ["*.bias"],
            {f"{n}.bias" for n in ("stem.0", "stem.1", "body.0", "body.1", "head")},
            set(),
        ),
        (["body.2"], set(), set()),
        (["head", "stem.0"], {"head.weight", "head.bias", "stem.0.weight", "stem.0.bias"}, set()),
    ],
)
def test_who_is_frozen(patterns, frozen, norms):
    model = Net()
    names = list(model.state_dict())
    assert set(freeze_by_pattern(model, patterns)) == frozen
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == frozen
    model.train()
    found = {
        n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and not m.training
    }
    assert found == norms
    assert model.stem.training  # Dropout and the like go on
    assert list(model.state_dict()) == names


def test_frozen_weights_and_statistics_stay_and_the_others_learn():
    model = Net()
    freeze_by_pattern(model, ["stem"])
    for each in (model, copy.deepcopy(model)):
        before = {k: v.clone() for k, v in each.state_dict().items()}
        optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            each.eval()
            each.train()
            each(torch.randn(2, 3, 4, 4)).square().mean().backward()
            optimizer.step()
        before.pop("body.0.bias")  # the norm behind it takes it out: no gradient
        after = each.state_dict()
        for name, value in before.items():
            assert torch.equal(value, after[name]) == name.startswith("stem"), name


@pytest.mark.parametrize("pattern", ["stam", "stem.0.wieght", "boddy.*"])
def test_a_pattern_without_a_match_is_named_with_near_names(pattern):
    near = {"stam": "stem", "stem.0.wieght": "stem.0.weight", "boddy.*": "body"}[pattern]
    with pytest.raises(ValueError, match=f"matches no module.*near: .*{near}"):
        freeze_by_pattern(Net(), ["head", pattern])


def test_one_text_is_no_list():
    with pytest.raises(ValueError, match="a list of patterns"):
        freeze_by_pattern(Net(), "stem")


def test_key_of_the_config():
    cfg = tiny_dense_config("RetinaNet")
    cfg.MODEL.FREEZE = ["backbone", "head.bbox_pred"]
    model = build_model(cfg)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    wanted = ("backbone.", "head.bbox_pred.")
    assert frozen == {n for n, _ in model.named_parameters() if n.startswith(wanted)}
    cfg.MODEL.FREEZE = ["backbon"]
    with pytest.raises(ValueError, match="near: backbone"):
        build_model(cfg)
