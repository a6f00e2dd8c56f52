import pytest
import torch
import torch.nn.functional as F
from torch import nn

from d2kit.config import get_cfg
from d2kit.modeling.backbone import FPN, Backbone, LastLevelMaxPool, LastLevelP6P7, build_backbone
from d2kit.modeling.backbone.fpn import _assert_strides_are_log2_contiguous


class Pyramid(Backbone):
    """Average pooling: features `a`, `b`, `c` of strides 4, 8, 16 and 3 channels."""

    def __init__(self):
        super().__init__()
        self._out_features = ["a", "b", "c"]
        self._out_feature_channels = dict.fromkeys("abc", 3)
        self._out_feature_strides = {"a": 4, "b": 8, "c": 16}

    def forward(self, x):
        return {k: F.avg_pool2d(x, s) for k, s in self._out_feature_strides.items()}


@pytest.mark.parametrize("fuse_type", ["sum", "avg"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_equals_the_definition(fuse_type, training, memory_format):
    fpn = FPN(Pyramid(), ["a", "b", "c"], 6, fuse_type=fuse_type)
    x = torch.randn(2, 3, 32, 48).contiguous(memory_format=memory_format)
    with torch.set_grad_enabled(training):
        out = fpn(x)
    below = fpn.bottom_up(x)
    merged = None
    for stage, name in ((4, "c"), (3, "b"), (2, "a")):
        lateral = getattr(fpn, f"fpn_lateral{stage}")(below[name])
        if merged is not None:
            up = merged.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            lateral = (lateral + up) / (2 if fuse_type == "avg" else 1)
        merged = lateral
        torch.testing.assert_close(out[f"p{stage}"], getattr(fpn, f"fpn_output{stage}")(merged))


@pytest.mark.parametrize(
    ("top_block", "names", "strides"),
    [
        (None, ["p2", "p3", "p4"], [4, 8, 16]),
        (LastLevelP6P7(6, 6, "p4"), ["p2", "p3", "p4", "p5", "p6"], [4, 8, 16, 32, 64]),
        (LastLevelP6P7(3, 6, "c"), ["p2", "p3", "p4", "p5", "p6"], [4, 8, 16, 32, 64]),
    ],
)
def test_levels_and_their_description_agree(top_block, names, strides):
    fpn = FPN(Pyramid(), ["a", "b", "c"], 6, top_block=top_block)
    out = fpn(torch.randn(2, 3, 64, 128))
    assert list(out) == names
    assert fpn.size_divisibility == 16
    for (name, spec), stride in zip(fpn.output_shape().items(), strides, strict=True):
        assert (spec.channels, spec.stride) == (6, stride)
        assert out[name].shape == (2, 6, 64 // stride, 128 // stride)


def test_max_pool_level_takes_every_second_pixel():
    x = torch.randn(1, 2, 5, 6)
    assert torch.equal(LastLevelMaxPool()(x)[0], x[:, :, ::2, ::2])


def test_a_size_that_does_not_halve_is_refused():
    with pytest.raises(ValueError, match="multiples of 16"):
        FPN(Pyramid(), ["a", "b", "c"], 6)(torch.randn(1, 3, 32, 40))


def test_norm_replaces_the_bias():
    fpn = FPN(Pyramid(), ["a", "b"], 32, norm="GN")
    assert fpn.fpn_lateral2.bias is None
    assert isinstance(fpn.fpn_output3.norm, nn.GroupNorm)
    assert fpn.fpn_lateral2.weight.shape == (32, 3, 1, 1)


def test_xavier_initialisation():
    conv = FPN(Pyramid(), ["a"], 64).fpn_output2
    bound = (3 / (64 * 9)) ** 0.5
    assert conv.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert torch.equal(conv.bias, torch.zeros(64))


def test_gradient_passes_through_the_fused_maps():
    fpn = FPN(Pyramid(), ["a", "b", "c"], 4)
    x = torch.randn(1, 3, 32, 32, requires_grad=True)
    sum(p.square().sum() for p in fpn(x).values()).backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is not None for p in fpn.parameters())


def test_square_padding_is_announced():
    assert FPN(Pyramid(), ["a"], 4, square_pad=640).padding_constraints == {"square_size": 640}
    assert FPN(Pyramid(), ["a"], 4).padding_constraints == {"square_size": 0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_features": ["a", "x"]}, "no output 'x'"),
        ({"in_features": []}, "IN_FEATURES"),
        ({"in_features": ["a", "c"]}, "double"),
        ({"in_features": ["a"], "fuse_type": "max"}, "'sum' or 'avg'"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        FPN(Pyramid(), out_channels=4, **arguments)


@pytest.mark.parametrize("strides", [[4, 8, 32], [4, 4], [3, 6], [8, 4], [0, 0]])
def test_strides_must_be_doubling_powers_of_two(strides):
    with pytest.raises(ValueError, match="powers of 2"):
        _assert_strides_are_log2_contiguous(strides)
    _assert_strides_are_log2_contiguous([4, 8, 16])


def fpn_cfg(name: str, features: list[str]):
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = name
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.OUT_FEATURES = features
    cfg.MODEL.FPN.IN_FEATURES = features
    cfg.MODEL.FPN.OUT_CHANNELS = 8
    return cfg


@pytest.mark.parametrize(
    ("name", "features", "levels"),
    [
        ("build_resnet_fpn_backbone", ["res2", "res3", "res4", "res5"], "23456"),
        ("build_retinanet_resnet_fpn_backbone", ["res3", "res4", "res5"], "34567"),
    ],
)
def test_from_config(name, features, levels):
    with torch.device("meta"):
        fpn = build_backbone(fpn_cfg(name, features))
    shapes = fpn.output_shape()
    assert {k: s.stride for k, s in shapes.items()} == {f"p{i}": 2 ** int(i) for i in levels}
    assert fpn.size_divisibility == 32


def test_retinanet_needs_res5():
    cfg = fpn_cfg("build_retinanet_resnet_fpn_backbone", ["res3", "res4"])
    with torch.device("meta"), pytest.raises(ValueError, match="add 'res5'"):
        build_backbone(cfg)


@pytest.mark.parametrize("training", [True, False])
def test_forward_is_one_graph_for_the_compiler(training):
    fpn = FPN(Pyramid(), ["a", "b", "c"], 4, norm="BN", top_block=LastLevelP6P7(4, 4, "p4"))
    x = torch.randn(1, 3, 32, 32)
    compiled = torch.compile(fpn, backend="eager", fullgraph=True)
    with torch.set_grad_enabled(training):
        out = compiled(x)
        for name, value in fpn(x).items():
            torch.testing.assert_close(out[name], value)
