import pytest
import torch
from torch import nn

from d2kit.config import get_cfg
from d2kit.layers import FrozenBatchNorm2d, ShapeSpec
from d2kit.modeling.backbone import (
    BACKBONE_REGISTRY,
    Backbone,
    BasicBlock,
    BasicStem,
    BottleneckBlock,
    DeformBottleneckBlock,
    ResNet,
    build_backbone,
    make_stage,
)


def tiny(norm: str = "BN", **kwargs) -> ResNet:
    """Stem and two stages of one block each, 4 to 16 channels."""
    stages = [
        ResNet.make_stage(BasicBlock, 1, in_channels=4, out_channels=8, norm=norm),
        ResNet.make_stage(BasicBlock, 1, in_channels=8, out_channels=16, norm=norm, stride=2),
    ]
    return ResNet(BasicStem(out_channels=4, norm=norm), stages, **kwargs)


def resnet_cfg(**resnets):
    cfg = get_cfg()
    for key, value in resnets.items():
        setattr(cfg.MODEL.RESNETS, key, value)
    return cfg


@pytest.mark.parametrize(
    ("block", "arguments"),
    [
        (BasicBlock, {}),
        (BottleneckBlock, {"bottleneck_channels": 4}),
        (BottleneckBlock, {"bottleneck_channels": 4, "stride_in_1x1": True}),
        (BottleneckBlock, {"bottleneck_channels": 4, "num_groups": 2, "dilation": 2}),
        (DeformBottleneckBlock, {"bottleneck_channels": 4}),
        (DeformBottleneckBlock, {"bottleneck_channels": 4, "deform_modulated": True}),
        (DeformBottleneckBlock, {"bottleneck_channels": 4, "deform_num_groups": 2}),
    ],
)
@pytest.mark.parametrize(("out_channels", "stride"), [(8, 1), (12, 2)])
def test_block_shape_and_gradient(block, arguments, out_channels, stride):
    module = block(8, out_channels, stride=stride, **arguments)
    x = torch.randn(2, 8, 9, 10, requires_grad=True)
    out = module(x)
    assert out.shape == (2, out_channels, -(-9 // stride), -(-10 // stride))
    assert out.min() >= 0
    assert (module.stride, module.out_channels) == (stride, out_channels)
    out.square().mean().backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is not None for p in module.parameters())


def test_a_block_leaves_its_input_alone():
    x = torch.randn(1, 8, 6, 6)
    before = x.clone()
    BottleneckBlock(8, 8, bottleneck_channels=4)(x)
    assert torch.equal(x, before)


def test_stride_is_where_it_was_asked_for():
    for in_1x1 in (True, False):
        block = BottleneckBlock(4, 8, bottleneck_channels=4, stride=2, stride_in_1x1=in_1x1)
        assert block.conv1.stride == ((2, 2) if in_1x1 else (1, 1))
        assert block.conv2.stride == ((1, 1) if in_1x1 else (2, 2))


def test_undeformed_start_equals_the_plain_block():
    deformed = DeformBottleneckBlock(8, 8, bottleneck_channels=4).eval()
    plain = BottleneckBlock(8, 8, bottleneck_channels=4).eval()
    missing = plain.load_state_dict(deformed.state_dict(), strict=False)
    assert not missing.missing_keys
    x = torch.randn(1, 8, 7, 7)
    torch.testing.assert_close(deformed(x), plain(x))


def test_msra_initialisation():
    conv = BottleneckBlock(64, 256, bottleneck_channels=64).conv2
    assert conv.bias is None
    assert conv.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)


@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "SyncBN"])
@pytest.mark.parametrize("freeze_at", [0, 1, 2, 3])
def test_freeze_fixes_leading_stages(norm, freeze_at):
    model = tiny(norm, freeze_at=freeze_at)
    for index, name in enumerate(["stem", "res2", "res3"]):
        part = getattr(model, name)
        frozen = index < freeze_at
        assert all(p.requires_grad != frozen for p in part.parameters())
        if frozen:
            assert any(isinstance(m, FrozenBatchNorm2d) for m in part.modules())
            assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in part.modules())


def test_group_norm_network():
    stages = [ResNet.make_stage(BasicBlock, 1, in_channels=32, out_channels=64, norm="GN")]
    model = ResNet(BasicStem(out_channels=32, norm="GN"), stages)
    assert isinstance(model.res2[0].conv1.norm, nn.GroupNorm)
    assert model(torch.randn(1, 3, 32, 32))["res2"].shape == (1, 64, 8, 8)


def test_outputs_and_their_description_agree():
    model = tiny(out_features=["stem", "res2", "res3"])
    out = model(torch.randn(2, 3, 64, 96))
    for name, spec in model.output_shape().items():
        size = (64 // spec.stride, 96 // spec.stride)
        assert out[name].shape == (2, spec.channels, *size)


def test_classifier_head_and_default_output():
    model = tiny(num_classes=5)
    assert list(model(torch.randn(2, 3, 64, 64))) == ["linear"]
    assert model(torch.randn(2, 3, 64, 64))["linear"].shape == (2, 5)
    assert list(tiny()(torch.randn(1, 3, 64, 64))) == ["res3"]


def test_stages_behind_the_last_output_are_dropped():
    assert not hasattr(tiny(out_features=["res2"]), "res3")


def test_per_block_arguments():
    blocks = make_stage(
        BottleneckBlock,
        3,
        in_channels=4,
        out_channels=8,
        bottleneck_channels=4,
        stride_per_block=[2, 1, 1],
        dilation_per_block=[1, 2, 3],
    )
    assert [b.stride for b in blocks] == [2, 1, 1]
    assert [b.conv2.dilation for b in blocks] == [(1, 1), (2, 2), (3, 3)]
    with pytest.raises(ValueError, match="3 entries"):
        make_stage(BasicBlock, 3, in_channels=4, out_channels=4, stride_per_block=[1, 1])
    with pytest.raises(ValueError, match="exclude stride"):
        make_stage(BasicBlock, 1, in_channels=4, out_channels=4, stride_per_block=[1], stride=1)


@pytest.mark.parametrize(
    ("depth", "counts", "channels"),
    [(18, [2, 2, 2, 2], 512), (50, [3, 4, 6, 3], 2048), (101, [3, 4, 23, 3], 2048)],
)
def test_default_stages(depth, counts, channels):
    with torch.device("meta"):
        stages = ResNet.make_default_stages(depth, norm="FrozenBN")
    assert [len(stage) for stage in stages] == counts
    assert [stage[0].stride for stage in stages] == [1, 2, 2, 2]
    assert stages[-1][-1].out_channels == channels


def test_unknown_depth_is_refused():
    with pytest.raises(ValueError, match="must be one of"):
        ResNet.make_default_stages(42)


def test_bad_input_and_bad_features_are_refused():
    with pytest.raises(ValueError, match=r"\(N, C, H, W\)"):
        tiny()(torch.randn(3, 8, 8))
    with pytest.raises(ValueError, match="res3"):
        tiny(out_features=["res33"])
    with pytest.raises(ValueError, match="at least one"):
        tiny(out_features=[])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "RES2_OUT_CHANNELS must be 64"),
        ({"RES2_OUT_CHANNELS": 64, "RES5_DILATION": 2}, "RES5_DILATION must be 1"),
        ({"RES2_OUT_CHANNELS": 64, "NUM_GROUPS": 2}, "NUM_GROUPS must be 1"),
        (
            {"RES2_OUT_CHANNELS": 64, "DEFORM_ON_PER_STAGE": [False, True, False, False]},
            "DEFORM_ON_PER_STAGE must be False",
        ),
    ],
)
def test_resnet18_refuses_what_basic_blocks_cannot_do(change, message):
    with pytest.raises(ValueError, match=message):
        build_backbone(resnet_cfg(DEPTH=18, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"DEPTH": 20}, "must be one of"),
        ({"RES5_DILATION": 4}, "must be 1 or 2"),
        ({"OUT_FEATURES": ["res6"]}, "unknown name 'res6'"),
    ],
)
def test_build_refuses_bad_values(change, message):
    with pytest.raises(ValueError, match=message):
        build_backbone(resnet_cfg(**change))


@pytest.mark.parametrize("depth", [18, 34])
def test_shallow_resnet_from_config(depth):
    cfg = resnet_cfg(DEPTH=depth, RES2_OUT_CHANNELS=64, OUT_FEATURES=["res2", "res5"])
    with torch.device("meta"):
        model = build_backbone(cfg)
    shapes = model.output_shape()
    assert {k: (s.channels, s.stride) for k, s in shapes.items()} == {
        "res2": (64, 4),
        "res5": (512, 32),
    }
    names = set(model.res3[0].state_dict())
    assert {"conv1.weight", "conv2.weight", "shortcut.weight"} <= names


def test_deformable_dilated_resnext_from_config():
    cfg = resnet_cfg(
        NUM_GROUPS=2,
        WIDTH_PER_GROUP=4,
        RES2_OUT_CHANNELS=16,
        STEM_OUT_CHANNELS=8,
        STRIDE_IN_1X1=False,
        NORM="BN",
        RES5_DILATION=2,
        OUT_FEATURES=["res5"],
        DEFORM_ON_PER_STAGE=[False, False, False, True],
        DEFORM_MODULATED=True,
    )
    model = build_backbone(cfg).eval()
    assert model.res5[0].conv2_offset.weight.shape == (27, 64, 3, 3)
    assert model.res5[0].conv2.weight.shape == (64, 32, 3, 3)
    assert model(torch.randn(1, 3, 64, 64))["res5"].shape == (1, 128, 4, 4)


def test_build_backbone_checks_what_it_got():
    BACKBONE_REGISTRY._do_register("not_a_backbone", lambda cfg, shape: nn.Identity())
    try:
        cfg = get_cfg()
        cfg.MODEL.BACKBONE.NAME = "not_a_backbone"
        with pytest.raises(TypeError, match="must build a d2kit.modeling.Backbone"):
            build_backbone(cfg)
    finally:
        del BACKBONE_REGISTRY._obj_map["not_a_backbone"]
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbon"
    with pytest.raises(KeyError, match="build_resnet_fpn_backbone"):
        build_backbone(cfg)


def test_number_of_input_channels():
    cfg = resnet_cfg(OUT_FEATURES=["stem"])
    assert build_backbone(cfg).stem.conv1.in_channels == 3
    assert build_backbone(cfg, ShapeSpec(channels=5)).stem.conv1.in_channels == 5


def test_user_backbone_needs_only_forward_and_its_shapes():
    class Mine(Backbone):
        def __init__(self):
            super().__init__()
            self._out_features = ["a"]
            self._out_feature_channels = {"a": 3}
            self._out_feature_strides = {"a": 2}

        def forward(self, x):
            return {"a": x[:, :, ::2, ::2]}

    model = Mine()
    assert model.output_shape() == {"a": ShapeSpec(channels=3, stride=2)}
    assert model.size_divisibility == 0
    assert model.padding_constraints == {}
