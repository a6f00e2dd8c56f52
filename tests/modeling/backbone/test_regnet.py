import re

import pytest
import torch
import torchvision
from torch import nn

from d2kit.layers import FrozenBatchNorm2d
from d2kit.modeling.backbone.regnet import (
    AnyNet,
    RegNet,
    ResBasicBlock,
    ResBottleneckBlock,
    ResStem,
    SimpleStem,
    VanillaBlock,
    regnet_widths,
)

STAGES = ["stem", "s1", "s2", "s3", "s4"]
# torchvision's name -> depth, w_0, w_a, w_m, group width, squeeze-and-excitation
PUBLISHED = {
    "regnet_x_800mf": (16, 56, 35.73, 2.28, 16, 0.0),
    "regnet_y_400mf": (16, 48, 27.89, 2.09, 8, 0.25),
    "regnet_x_3_2gf": (25, 88, 26.31, 2.25, 48, 0.0),
    "regnet_y_3_2gf": (21, 80, 42.63, 2.66, 24, 0.25),
}


def published(name, **kwargs):
    depth, w_0, w_a, w_m, group_width, se_ratio = PUBLISHED[name]
    return RegNet(
        stem_class=SimpleStem,
        stem_width=32,
        block_class=ResBottleneckBlock,
        depth=depth,
        w_a=w_a,
        w_0=w_0,
        w_m=w_m,
        group_width=group_width,
        se_ratio=se_ratio,
        **{"out_features": STAGES, **kwargs},
    )


def theirs(name: str) -> str:
    """Our parameter's name in torchvision's layout."""
    name = re.sub(r"^stem\.conv\.", "stem.0.", name)
    name = re.sub(r"^stem\.bn\.", "stem.1.", name)
    name = re.sub(
        r"^s(\d)\.b(\d+)\.",
        lambda m: f"trunk_output.block{m[1]}.block{m[1]}-{int(m[2]) - 1}.",
        name,
    )
    name = re.sub(r"\.f\.([abc])\.", r".f.\1.0.", name)
    name = re.sub(r"\.f\.([abc])_bn\.", r".f.\1.1.", name)
    name = name.replace(".proj.", ".proj.0.").replace("0.bn.", "0.proj.1.")
    return name.replace("se.f_ex.0", "se.fc1").replace("se.f_ex.2", "se.fc2")


@pytest.mark.parametrize("name", ["regnet_x_800mf", "regnet_y_400mf"])
def test_features_are_those_of_torchvision(name):
    torch.manual_seed(0)
    ours, other = published(name).eval(), torchvision.models.get_model(name).eval()
    for module in ours.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
    state = {theirs(k): v for k, v in ours.state_dict().items()}
    state.update({k: v for k, v in other.state_dict().items() if k.startswith("fc.")})
    other.load_state_dict(state)
    x = torch.randn(2, 3, 70, 101)
    with torch.no_grad():
        features = ours(x)
        expected = {"stem": other.stem(x)}
        for stage, block in zip(STAGES[1:], other.trunk_output, strict=True):
            expected[stage] = block(list(expected.values())[-1])
    assert list(features) == STAGES
    for stage in STAGES:
        torch.testing.assert_close(features[stage], expected[stage], rtol=1e-4, atol=1e-4)
        shape = ours.output_shape()[stage]
        assert features[stage].shape[1] == shape.channels
        assert features[stage].shape[2] == -(-70 // shape.stride)


@pytest.mark.parametrize("name", PUBLISHED)
def test_widths_of_published_models(name):
    depth, w_0, w_a, w_m, *_ = PUBLISHED[name]
    with torch.device("meta"):
        ours = published(name)
    other = torchvision.models.get_model(name)
    assert sum(regnet_widths(depth, w_a, w_0, w_m)[1]) == depth
    shapes = {k: v.shape for k, v in other.state_dict().items() if not k.startswith("fc.")}
    assert {theirs(k): v.shape for k, v in ours.state_dict().items()} == shapes


def test_widths_of_the_paper():
    """RegNetX-400MF as the paper lists it: 384 wide at last, 392 before whole groups of 16."""
    assert regnet_widths(22, 24.48, 24, 2.54) == ([24, 64, 152, 392], [1, 2, 7, 12])
    net = RegNet(
        stem_class=SimpleStem,
        stem_width=32,
        block_class=ResBottleneckBlock,
        depth=22,
        w_a=24.48,
        w_0=24,
        w_m=2.54,
        group_width=16,
        out_features=STAGES,
    )
    assert [s.channels for s in net.output_shape().values()] == [32, 32, 64, 160, 384]


def tiny(block=ResBottleneckBlock, stem=SimpleStem, **kwargs):
    arguments = {
        "stem_width": 4,
        "depths": [1, 2],
        "widths": [8, 16],
        "group_widths": [4, 4],
        "strides": [2, 2],
        "bottleneck_ratios": [1.0, 0.5],
        **kwargs,
    }
    return AnyNet(stem_class=stem, block_class=block, **arguments)


@pytest.mark.parametrize("block", [ResBottleneckBlock, ResBasicBlock, VanillaBlock])
@pytest.mark.parametrize(("stem", "stride"), [(SimpleStem, 2), (ResStem, 4)])
def test_every_block_trains(block, stem, stride):
    net = tiny(block, stem, se_ratio=0.25, out_features=["stem", "s1", "s2"])
    out = net(torch.randn(2, 3, 32, 48))
    strides = {"stem": stride, "s1": 2 * stride, "s2": 4 * stride}
    assert {k: 32 // v.shape[2] for k, v in out.items()} == strides
    assert {k: v.stride for k, v in net.output_shape().items()} == strides
    sum(v.square().mean() for v in out.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize(("freeze_at", "frozen"), [(0, set()), (1, {"stem"}), (2, {"stem", "s1"})])
def test_freezing(freeze_at, frozen):
    net = tiny(freeze_at=freeze_at)
    for name in ("stem", "s1", "s2"):
        part = getattr(net, name)
        assert all(p.requires_grad != (name in frozen) for p in part.parameters())
        norms = [m for m in part.modules() if "BatchNorm" in type(m).__name__]
        assert norms
        assert all(isinstance(m, FrozenBatchNorm2d) == (name in frozen) for m in norms)


def test_stages_behind_the_last_output_are_not_kept():
    assert not any(k.startswith("s2") for k in tiny(out_features=["s1"]).state_dict())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny(out_features=["s9"]), "s9"),
        (lambda: tiny(out_features=[]), "at least one"),
        (lambda: tiny(depths=[1]), "one entry"),
        (lambda: tiny(group_widths=[3, 4]), "group_width 3"),
        (lambda: regnet_widths(10, 20.0, 44, 2.0), "multiple of 8"),
        (lambda: regnet_widths(10, 20.0, 48, 1.0), "w_m"),
        (lambda: tiny()(torch.zeros(3, 8, 8)), "N, C, H, W"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
