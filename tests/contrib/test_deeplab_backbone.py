"""The ResNet of DeepLab."""

import pytest
import torch

from d2kit.config import get_cfg
from d2kit.contrib.deeplab import (
    add_deeplab_config,
)
from d2kit.layers import FrozenBatchNorm2d
from d2kit.modeling import build_backbone


def backbone(*options):
    cfg = get_cfg()
    add_deeplab_config(cfg)
    cfg.merge_from_list(
        ["MODEL.BACKBONE.NAME", "build_resnet_deeplab_backbone", "MODEL.BACKBONE.FREEZE_AT", 0]
        + ["MODEL.RESNETS.OUT_FEATURES", ["res2", "res4", "res5"]]
        + ["MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 8]
        + ["MODEL.RESNETS.WIDTH_PER_GROUP", 2, *options]
    )
    return build_backbone(cfg)


@pytest.mark.parametrize(
    ("res4", "res5", "strides"), [(1, 1, (4, 16, 32)), (1, 2, (4, 16, 16)), (2, 4, (4, 8, 8))]
)
@torch.no_grad()
def test_strides_and_dilations(res4, res5, strides):
    net = backbone("MODEL.RESNETS.RES4_DILATION", res4, "MODEL.RESNETS.RES5_DILATION", res5)
    shapes = net.output_shape()
    assert tuple(shapes[name].stride for name in ("res2", "res4", "res5")) == strides
    for name, feature in net.eval()(torch.rand(1, 3, 64, 96)).items():
        stride = shapes[name].stride
        assert feature.shape == (1, shapes[name].channels, 64 // stride, 96 // stride)
    dilations = [[block.conv2.dilation[0] for block in stage] for stage in net.stages]
    assert dilations[2:] == [[res4] * 6, [res5, 2 * res5, 4 * res5]]
    assert [block.conv2.padding[0] for block in net.res5] == dilations[3]


def test_stems():
    stem = backbone().stem
    convs = (stem.conv1, stem.conv2, stem.conv3)
    assert [tuple(c.weight.shape) for c in convs] == [(4, 3, 3, 3), (4, 4, 3, 3), (8, 4, 3, 3)]
    assert backbone("MODEL.RESNETS.STEM_TYPE", "basic").stem.conv1.kernel_size == (7, 7)


def test_frozen_stem():
    net = backbone("MODEL.BACKBONE.FREEZE_AT", 1, "MODEL.RESNETS.NORM", "BN")
    assert not any(p.requires_grad for p in net.stem.parameters())
    assert isinstance(net.stem.conv3.norm, FrozenBatchNorm2d)
    assert all(p.requires_grad for p in net.res2.parameters())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("DEPTH", 18), ("RES4_DILATION", 2), ("RES5_DILATION", 3), ("STEM_TYPE", "deep"),
        ("RES5_MULTI_GRID", [1, 2]), ("OUT_FEATURES", ["res6"]),
    ],
)  # fmt: skip
def test_mistakes_are_named(key, value):
    with pytest.raises(ValueError, match="res6" if key == "OUT_FEATURES" else key):
        backbone(f"MODEL.RESNETS.{key}", value)
