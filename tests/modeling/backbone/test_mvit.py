import pytest
import torch
from timm.models.mvitv2 import MultiScaleBlock as TimmBlock
from torch import nn

from d2kit.modeling.backbone.mvit import MultiScaleAttention, MultiScaleBlock, MViT


def randomise(module):
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.eval()


@pytest.mark.parametrize("residual_pooling", [True, False])
@pytest.mark.parametrize(
    ("dim", "dim_out", "heads", "stride_q", "stride_kv"),
    [(8, 8, 1, 1, 4), (8, 16, 2, 2, 2), (16, 16, 2, 1, 2), (16, 32, 4, 2, 1), (16, 16, 4, 1, 1)],
)
def test_blocks_are_those_of_timm(dim, dim_out, heads, stride_q, stride_kv, residual_pooling):
    size = (8, 8)
    ours = randomise(
        MultiScaleBlock(
            dim,
            dim_out,
            heads,
            stride_q=stride_q,
            stride_kv=stride_kv,
            residual_pooling=residual_pooling,
            use_rel_pos=True,
            input_size=size,
        )
    )
    other = TimmBlock(
        dim,
        dim_out,
        heads,
        feat_size=size,
        kernel_q=(3, 3),
        kernel_kv=(3, 3),
        stride_q=(stride_q, stride_q),
        stride_kv=(stride_kv, stride_kv),
        has_cls_token=False,
        expand_attn=True,
        rel_pos_type="spatial",
        residual_pooling=residual_pooling,
        norm_layer=nn.LayerNorm,
    ).eval()
    state = ours.state_dict()
    for name in [name for name in state if name.startswith("proj.")]:
        state[f"shortcut_proj_attn.{name.removeprefix('proj.')}"] = state.pop(name)
    missing, unexpected = other.load_state_dict(state, strict=False)
    assert not unexpected
    # timm has no convolution where nothing is pooled
    assert not missing
    x = torch.randn(2, *size, dim)
    with torch.no_grad():
        expected, out_size = other(x.flatten(1, 2), list(size))
        got = ours(x)
    assert list(got.shape[1:3]) == list(out_size)
    torch.testing.assert_close(got.flatten(1, 2), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("stride_q", "stride_kv"), [(1, 1), (1, 2), (2, 1), (2, 4)])
def test_a_window_sees_itself_alone(stride_q, stride_kv):
    """A change inside one window changes nothing outside of it, but for the pooling's border."""
    torch.manual_seed(0)
    attention = randomise(
        MultiScaleAttention(
            8, 8, 2, stride_q=stride_q, stride_kv=stride_kv, window_size=4, use_rel_pos=True
        )
    )
    x = torch.randn(1, 12, 8, 8)
    changed = x.clone()
    changed[:, 5:7, 1:3] += 1  # the window of rows 4 to 7 and columns 0 to 3, not on its border
    with torch.no_grad():
        difference = (attention(x) - attention(changed)).abs().amax(3)[0] > 1e-6
    rows = slice(4 // stride_q, 8 // stride_q)
    inside = difference[rows, : 4 // stride_q]
    assert inside.any()
    if stride_q == stride_kv == 1:
        assert inside.all()
        assert difference.sum() == inside.sum()


def test_one_window_over_all_is_no_window():
    whole = randomise(MultiScaleAttention(8, 8, 2, use_rel_pos=True, input_size=(8, 8)))
    window = MultiScaleAttention(8, 8, 2, use_rel_pos=True, window_size=8).eval()
    window.load_state_dict(whole.state_dict())
    x = torch.randn(2, 8, 8, 8)
    torch.testing.assert_close(whole(x), window(x))


def tiny(**kwargs):
    arguments = {
        "img_size": 64,
        "embed_dim": 8,
        "depth": 6,
        "num_heads": 1,
        "last_block_indexes": (0, 2, 4, 5),
        "adaptive_window_size": 8,
        **kwargs,
    }
    return MViT(**arguments)


@pytest.mark.parametrize("size", [(64, 96), (50, 70)])
@pytest.mark.parametrize("window", [8, 0])
def test_shapes_and_gradients(size, window):
    net = tiny(use_abs_pos=True, adaptive_window_size=window, drop_path_rate=0.1)
    out = net(torch.randn(2, 3, *size))
    assert list(out) == ["scale2", "scale3", "scale4", "scale5"]
    for name, shape in net.output_shape().items():
        expected = (2, shape.channels, *(-(-side // shape.stride) for side in size))
        assert out[name].shape == expected
    sum(v.square().mean() for v in out.values()).backward()
    assert [n for n, p in net.named_parameters() if p.grad is None] == []


def test_recomputing_changes_nothing():
    torch.manual_seed(0)
    plain, saving = tiny(), tiny(use_act_checkpoint=True)
    saving.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 64, 64)
    for net in (plain, saving):
        net(x)["scale5"].square().sum().backward()
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_parameter_names_are_those_of_published_checkpoints():
    with torch.device("meta"):
        net = MViT(depth=10, last_block_indexes=(0, 2, 7, 9), rel_pos_zero_init=True)
        shapes = {k: tuple(v.shape) for k, v in net.state_dict().items()}
    published = {
        "patch_embed.proj.weight": (96, 3, 7, 7),
        "blocks.0.attn.qkv.weight": (288, 96),
        "blocks.0.attn.pool_k.weight": (96, 1, 3, 3),
        "blocks.0.attn.rel_pos_h": (111, 96),
        "blocks.1.attn.qkv.weight": (576, 96),
        "blocks.1.proj.weight": (192, 96),
        "blocks.1.attn.norm_v.weight": (96,),
        "blocks.9.attn.rel_pos_w": (13, 96),
        "blocks.9.mlp.fc1.weight": (3072, 768),
        "scale5_norm.weight": (768,),
    }
    assert published.items() <= shapes.items()


@pytest.mark.parametrize(
    ("freeze_at", "prefixes"),
    [
        (0, ()),
        (1, ("patch", "pos")),
        (2, ("patch", "pos", "blocks.0")),
        (3, ("patch", "pos", "blocks.0", "blocks.1", "blocks.2")),
    ],
)
def test_freezing(freeze_at, prefixes):
    for name, parameter in tiny(freeze_at=freeze_at, use_abs_pos=True).named_parameters():
        assert parameter.requires_grad != name.startswith(prefixes or "none"), name


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"out_features": ("scale9",)}, "scale9"),
        ({"out_features": ()}, "out_features"),
        ({"last_block_indexes": (0, 2, 4)}, "last block, 5"),
        ({"last_block_indexes": (2, 0, 5)}, "ascend"),
        ({"num_heads": 3}, "num_heads"),
        ({"adaptive_window_size": 6}, "window"),
    ],
)
def test_wrong_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny(**kwargs)
