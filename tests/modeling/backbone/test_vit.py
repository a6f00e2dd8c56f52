import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import nn

from d2kit.modeling.backbone.fpn import LastLevelMaxPool
from d2kit.modeling.backbone.vit import SimpleFeaturePyramid, ViT, get_vit_lr_decay_rate


def tiny(**kwargs):
    arguments = {
        "img_size": 64,
        "patch_size": 8,
        "embed_dim": 16,
        "depth": 3,
        "num_heads": 2,
        "pretrain_img_size": 64,
        **kwargs,
    }
    return ViT(**arguments)


def randomise(module):
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module.eval()


def test_features_are_those_of_timm_without_relative_positions():
    ours = randomise(tiny(pretrain_use_cls_token=False))
    other = VisionTransformer(
        img_size=64,
        patch_size=8,
        embed_dim=16,
        depth=3,
        num_heads=2,
        num_classes=0,
        class_token=False,
        global_pool="avg",
        fc_norm=False,
        norm_layer=nn.LayerNorm,
        final_norm=False,
    ).eval()
    other.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = other.forward_features(x).transpose(1, 2).unflatten(2, (8, 8))
        torch.testing.assert_close(ours(x)["last_feat"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [3, 4])
def test_features_are_those_of_timm_with_windows_and_relative_positions(window):
    """8x8 tokens: windows of 3 need padding, windows of 4 none."""
    ours = randomise(
        tiny(
            use_rel_pos=True,
            window_size=window,
            window_block_indexes=(0, 2),
            pretrain_use_cls_token=False,
        )
    )
    other = VisionTransformerSAM(
        img_size=64,
        patch_size=8,
        embed_dim=16,
        depth=3,
        num_heads=2,
        num_classes=0,
        use_rel_pos=True,
        window_size=window,
        global_attn_indexes=(1,),
        norm_layer=nn.LayerNorm,
    ).eval()
    other.neck = nn.Identity()
    state = ours.state_dict()
    state["pos_embed"] = state["pos_embed"].unflatten(1, (8, 8))
    other.load_state_dict(state)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        got, expected = ours(x)["last_feat"], other.forward_features(x)
    if expected.shape != got.shape:
        expected = expected.permute(0, 3, 1, 2)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(64, 64), (40, 96)])
def test_other_sizes_and_gradients(size):
    net = tiny(
        use_rel_pos=True,
        window_size=3,
        window_block_indexes=(0,),
        residual_block_indexes=(1,),
        drop_path_rate=0.1,
        use_act_checkpoint=True,
    )
    out = net(torch.randn(2, 3, *size))["last_feat"]
    assert out.shape == (2, 16, size[0] // 8, size[1] // 8)
    assert net.output_shape()["last_feat"].channels == 16
    assert net.size_divisibility == net.output_shape()["last_feat"].stride == 8
    out.square().mean().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None] == []


def test_a_residual_block_starts_as_the_identity():
    torch.manual_seed(0)
    plain, longer = tiny(), tiny(residual_block_indexes=(0, 2))
    missing = longer.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing
    assert all(".residual." in name for name in missing)
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(plain(x), longer(x))


def test_parameter_names_are_those_of_published_checkpoints():
    with torch.device("meta"):
        net = ViT(use_rel_pos=True, window_size=14, window_block_indexes=(0,))
        shapes = {k: tuple(v.shape) for k, v in net.state_dict().items()}
    published = {
        "pos_embed": (1, 197, 768),
        "patch_embed.proj.weight": (768, 3, 16, 16),
        "blocks.0.attn.qkv.weight": (2304, 768),
        "blocks.0.attn.rel_pos_h": (27, 64),
        "blocks.1.attn.rel_pos_w": (127, 64),
        "blocks.11.mlp.fc2.weight": (768, 3072),
        "blocks.3.norm2.bias": (768,),
    }
    assert published.items() <= shapes.items()


@pytest.mark.parametrize(
    ("freeze_at", "prefixes"), [(0, ()), (1, ("p",)), (2, ("p", "blocks.0")), (9, ("p", "blocks"))]
)
def test_freezing(freeze_at, prefixes):
    for name, parameter in tiny(freeze_at=freeze_at).named_parameters():
        assert parameter.requires_grad != name.startswith(prefixes or "none"), name


@pytest.mark.parametrize("norm", ["LN", ""])
@pytest.mark.parametrize(
    ("factors", "top", "names"),
    [
        ([4.0, 2.0, 1.0, 0.5], True, ["p1", "p2", "p3", "p4", "p5"]),
        ([2.0, 1.0], False, ["p2", "p3"]),
        ([1.0], False, ["p3"]),
    ],
)
def test_simple_feature_pyramid(factors, top, names, norm):
    coarser = LastLevelMaxPool()
    coarser.in_feature = "p4"
    net = SimpleFeaturePyramid(
        tiny(), "last_feat", 6, factors, coarser if top else None, norm, square_pad=64
    )
    assert net.padding_constraints == {
        "size_divisibility": net.size_divisibility,
        "square_size": 64,
    }
    out = net(torch.randn(2, 3, 32, 64))
    assert list(out) == list(net.output_shape()) == names
    for name, shape in net.output_shape().items():
        assert shape.channels == 6
        assert out[name].shape == (2, 6, 32 // shape.stride, 64 // shape.stride)
    sum(v.square().mean() for v in out.values()).backward()
    assert [n for n, p in net.named_parameters() if p.grad is None] == []


def test_names_of_the_published_pyramid():
    with torch.device("meta"):
        net = SimpleFeaturePyramid(ViT(depth=1), "last_feat", 256, (4.0, 2.0, 1.0, 0.5))
    shapes = {k: tuple(v.shape) for k, v in net.state_dict().items() if k.startswith("simfp")}
    published = {
        "simfp_2.0.weight": (768, 384, 2, 2),
        "simfp_2.1.weight": (384,),
        "simfp_2.3.weight": (384, 192, 2, 2),
        "simfp_2.4.weight": (256, 192, 1, 1),
        "simfp_2.4.norm.weight": (256,),
        "simfp_2.5.weight": (256, 256, 3, 3),
        "simfp_3.0.weight": (768, 384, 2, 2),
        "simfp_3.1.weight": (256, 384, 1, 1),
        "simfp_4.0.weight": (256, 768, 1, 1),
        "simfp_5.1.norm.bias": (256,),
    }
    assert published.items() <= shapes.items()
    assert "simfp_2.4.bias" not in shapes


@pytest.mark.parametrize(
    ("name", "power"),
    [
        ("backbone.net.pos_embed", 13),
        ("backbone.net.patch_embed.proj.weight", 13),
        ("backbone.net.blocks.0.attn.qkv.weight", 12),
        ("backbone.net.blocks.11.norm1.weight", 1),
        ("backbone.net.blocks.11.residual.conv1.weight", 0),
        ("backbone.simfp_2.0.weight", 0),
        ("roi_heads.box_head.fc1.weight", 0),
        ("proposal_generator.blocks.3.weight", 0),
    ],
)
def test_learning_rates_decay_towards_the_image(name, power):
    assert get_vit_lr_decay_rate(name, 0.7, 12) == pytest.approx(0.7**power)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny(num_heads=3), "heads"),
        (lambda: SimpleFeaturePyramid(tiny(), "last_feet", 8, [1.0]), "last_feat"),
        (lambda: SimpleFeaturePyramid(tiny(), "last_feat", 8, [3.0]), "scale_factors"),
        (lambda: SimpleFeaturePyramid(tiny(), "last_feat", 8, [4.0, 1.0]), "double"),
        (
            lambda: tiny(pretrain_use_cls_token=False, pretrain_img_size=8).load_state_dict(
                {"pos_embed": torch.zeros(1, 2, 16)}
            ),
            "pos_embed",
        ),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        make()
