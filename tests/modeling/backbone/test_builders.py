import sys

import pytest
import timm
import torch
from torch import nn

from d2kit.config import get_cfg
from d2kit.modeling.backbone import TimmBackbone, build_backbone
from d2kit.modeling.backbone.builders import _centred
from d2kit.structures import ImageList

SMALL = {
    "build_regnet_fpn_backbone": (
        *("MODEL.REGNET.DEPTH", 6, "MODEL.REGNET.W_A", 8.0, "MODEL.REGNET.W_0", 8),
        *("MODEL.REGNET.W_M", 2.0, "MODEL.REGNET.GROUP_WIDTH", 8, "MODEL.REGNET.STEM_WIDTH", 8),
    ),
    "build_swin_fpn_backbone": (
        *("MODEL.SWIN.EMBED_DIM", 8, "MODEL.SWIN.DEPTHS", [1, 2, 1, 1]),
        *("MODEL.SWIN.NUM_HEADS", [1, 2, 2, 4], "MODEL.SWIN.WINDOW_SIZE", 3),
    ),
    "build_mvit_fpn_backbone": (
        *("MODEL.MVIT.EMBED_DIM", 8, "MODEL.MVIT.DEPTH", 5, "MODEL.MVIT.WINDOW_SIZE", 8),
        *("MODEL.MVIT.LAST_BLOCKS", [0, 1, 3, 4], "MODEL.MVIT.IMG_SIZE", 64),
    ),
    "build_vit_sfp_backbone": (
        *("MODEL.VIT.EMBED_DIM", 16, "MODEL.VIT.DEPTH", 3, "MODEL.VIT.NUM_HEADS", 2),
        *("MODEL.VIT.WINDOW_SIZE", 3, "MODEL.VIT.GLOBAL_BLOCKS", [1], "MODEL.VIT.IMG_SIZE", 64),
    ),
    "build_timm_fpn_backbone": ("MODEL.TIMM.NAME", "test_resnet"),
}


def config(name, *options):
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = name
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.FPN.OUT_CHANNELS = 8
    cfg.merge_from_list([*SMALL[name], *options])
    return cfg


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(("top", "levels"), [("pool", 5), ("conv", 6), ("none", 4)])
def test_pyramids_by_name(name, top, levels):
    torch.manual_seed(0)
    net = build_backbone(config(name, "MODEL.FPN.TOP_BLOCK", top))
    out = net(torch.randn(2, 3, 64, 96))
    assert list(out) == list(net.output_shape()) == [f"p{i + 2}" for i in range(levels)]
    assert net.size_divisibility == 32
    for level, (key, shape) in enumerate(net.output_shape().items(), start=2):
        assert (shape.channels, shape.stride) == (8, 2**level)
        assert out[key].shape == (2, 8, -(-64 // 2**level), -(-96 // 2**level))
    sum(v.square().mean() for v in out.values()).backward()
    missing = [n for n, p in net.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []


@pytest.mark.parametrize("name", SMALL)
def test_batches_of_any_size_are_padded_to_what_fits(name):
    torch.manual_seed(0)
    net = build_backbone(config(name)).eval()
    sizes = [(50, 70), (33, 65)]
    batch = ImageList.from_tensors(
        [torch.randn(3, *size) for size in sizes],
        net.size_divisibility,
        padding_constraints=net.padding_constraints,
    )
    assert batch.tensor.shape == (2, 3, 64, 96)
    out = net(batch.tensor)
    assert out["p5"].shape == (2, 8, 2, 3)


def test_square_padding():
    net = build_backbone(config("build_vit_sfp_backbone", "MODEL.VIT.SQUARE_PAD", 100))
    batch = ImageList.from_tensors(
        [torch.zeros(3, 50, 70)],
        net.size_divisibility,
        padding_constraints=net.padding_constraints,
    )
    assert batch.tensor.shape[2:] == (128, 128)


@pytest.mark.parametrize("name", SMALL)
def test_bfloat16(name):
    torch.manual_seed(0)
    net = build_backbone(config(name)).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        exact = net(x)["p4"]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = net(x)["p4"]
    assert (rough.float() - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("name", SMALL)
def test_freezing_by_the_config(name):
    counts = []
    for freeze_at in (0, 1, 2):
        net = build_backbone(config(name, "MODEL.BACKBONE.FREEZE_AT", freeze_at))
        counts.append(sum(not p.requires_grad for p in net.parameters()))
        # a frozen part must not be what the pyramid itself consists of
        own = [p for n, p in net.named_parameters() if n.startswith(("fpn", "simfp"))]
        assert own
        assert all(p.requires_grad for p in own)
    assert counts[0] == 0
    assert counts[0] < counts[1] < counts[2]


def test_some_maps_only():
    net = build_backbone(
        config("build_timm_fpn_backbone", "MODEL.FPN.IN_FEATURES", ["res3", "res4"])
    )
    assert list(net.eval()(torch.zeros(1, 3, 32, 32))) == ["p3", "p4", "p5"]


def test_unknown_top_block():
    with pytest.raises(ValueError, match="TOP_BLOCK"):
        build_backbone(config("build_swin_fpn_backbone", "MODEL.FPN.TOP_BLOCK", "pooling"))


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet18", (64, 96)),
        ("densenet121", (64, 96)),
        ("inception_v3", (128, 160)),
        ("test_convnext", (64, 96)),
        ("hardcorenas_a", (64, 96)),
        pytest.param("swin_tiny_patch4_window7_224", (64, 96), marks=pytest.mark.slow),
        pytest.param("xception41", (64, 96), marks=pytest.mark.slow),
    ],
)
def test_networks_of_timm(name, size):
    net = TimmBackbone(name).eval()
    assert list(net.output_shape()) == ["res2", "res3", "res4", "res5"]
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        out = net(x)
        given = dict(zip(out, net.features(x), strict=True))
    for key, shape in net.output_shape().items():
        assert out[key].shape == (1, shape.channels, *(side // shape.stride for side in size))
        expected = given[key]
        if expected.shape == out[key].shape:  # padded networks: timm's own maps
            torch.testing.assert_close(out[key], expected)
    assert torch.isfinite(out["res5"]).all()


def test_maps_are_timms_own():
    torch.manual_seed(0)
    net = TimmBackbone("test_resnet").eval()
    other = timm.create_model("test_resnet", features_only=True).eval()
    other.load_state_dict(net.features.state_dict())
    x = torch.randn(1, 3, 45, 70)  # not divisible by 32
    for got, expected in zip(net(x).values(), other(x)[1:], strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("freeze_at", "frozen"),
    [(0, ()), (1, ("conv1", "bn1")), (2, ("conv1", "bn1", "layer1"))],
)
def test_frozen_parts_of_a_resnet(freeze_at, frozen):
    net = TimmBackbone("test_resnet", freeze_at=freeze_at).train()
    still = {n.split(".")[0] for n, p in net.features.named_parameters() if not p.requires_grad}
    assert {n.rstrip("0123456789") for n in still} == {n.rstrip("0123456789") for n in frozen}
    before = {k: v.clone() for k, v in net.state_dict().items()}
    net(torch.randn(2, 3, 64, 64))
    for name, module in net.features.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            part_is_frozen = name.startswith(frozen or ("none",))
            assert module.training != part_is_frozen, name
    moved = [k for k, v in net.state_dict().items() if not torch.equal(v, before[k])]
    assert moved
    assert not any(k.removeprefix("features.").startswith(frozen or ("none",)) for k in moved)


@pytest.mark.parametrize("size", [(5, 6), (2, 3), (4, 4), (3, 7)])
def test_maps_keep_their_centre(size):
    """A map of 4x4 cells: what is added lies outside, what is cut was outermost."""
    x = torch.arange(16.0).view(1, 1, 4, 4)
    out = _centred(x, size)
    assert out.shape[2:] == size
    rows = (torch.arange(size[0]) - (size[0] - 4) // 2).clamp(0, 3)
    columns = (torch.arange(size[1]) - (size[1] - 4) // 2).clamp(0, 3)
    assert torch.equal(out[0, 0], x[0, 0][rows][:, columns])


@pytest.mark.parametrize(
    ("name", "indices", "message"),
    [
        ("resnet81", (), "resnet18"),
        ("vit_tiny_patch16_224", (), "build_vit_sfp_backbone"),
        ("test_resnet", (1, 9), "OUT_INDICES"),
        ("test_resnet", (1, 1), "different"),
    ],
)
def test_wrong_models_are_named(name, indices, message):
    with pytest.raises(ValueError, match=message):
        TimmBackbone(name, out_indices=indices)


def test_without_timm_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"pip install d2kit\[timm\]"):
        build_backbone(config("build_timm_fpn_backbone"))
