import re

import pytest
import torch
import torch.nn.functional as F
import torchvision

from d2kit.modeling.backbone.swin import SwinTransformer

DEPTHS, HEADS = (2, 2, 2, 1), (1, 2, 2, 4)


def tiny(**kwargs):
    arguments = {
        "embed_dim": 8,
        "depths": DEPTHS,
        "num_heads": HEADS,
        "window_size": 3,
        "drop_path_rate": 0.0,
        **kwargs,
    }
    return SwinTransformer(**arguments)


def theirs(name: str) -> str:
    """Our parameter's name in torchvision's layout."""
    name = re.sub(r"^patch_embed\.proj", "features.0.0", name)
    name = re.sub(r"^patch_embed\.norm", "features.0.2", name)
    name = re.sub(r"^layers\.(\d)\.blocks", lambda m: f"features.{2 * int(m[1]) + 1}", name)
    name = re.sub(r"^layers\.(\d)\.downsample", lambda m: f"features.{2 * int(m[1]) + 2}", name)
    return name.replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.3")


@pytest.mark.parametrize("size", [(96, 128), (64, 160), (100, 132)])
def test_features_are_those_of_torchvision(size):
    torch.manual_seed(0)
    ours = tiny().eval()
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    other = torchvision.models.SwinTransformer([4, 4], 8, DEPTHS, HEADS, [3, 3]).eval()
    state = other.state_dict()
    for name, value in ours.state_dict().items():
        if not re.match(r"norm\d", name):
            other_name = theirs(name)
            assert other_name in state, name
            state[other_name] = value.flatten() if name.endswith("_index") else value
    other.load_state_dict(state)
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        features = ours(x)
        y = x
        for i, layer in enumerate(other.features):
            y = layer(y)
            if i % 2:
                norm = getattr(ours, f"norm{i // 2}")
                expected = F.layer_norm(y, y.shape[-1:], norm.weight, norm.bias)
                got = features[f"p{i // 2}"].permute(0, 2, 3, 1)
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_parameter_names_are_those_of_published_checkpoints():
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in SwinTransformer(ape=True).state_dict().items()}
    published = {
        "absolute_pos_embed": (1, 96, 56, 56),
        "patch_embed.proj.weight": (96, 3, 4, 4),
        "patch_embed.norm.bias": (96,),
        "layers.0.blocks.1.norm1.weight": (96,),
        "layers.0.blocks.0.attn.relative_position_bias_table": (169, 3),
        "layers.0.blocks.0.attn.relative_position_index": (49, 49),
        "layers.1.blocks.0.attn.qkv.weight": (576, 192),
        "layers.2.blocks.5.attn.proj.bias": (384,),
        "layers.2.downsample.reduction.weight": (768, 1536),
        "layers.2.downsample.norm.weight": (1536,),
        "layers.3.blocks.1.mlp.fc1.weight": (3072, 768),
        "norm3.weight": (768,),
    }
    assert published.items() <= shapes.items()
    assert "layers.3.downsample.norm.weight" not in shapes


@pytest.mark.parametrize("size", [(64, 96), (37, 51)])
@pytest.mark.parametrize("recompute", [False, True])
def test_shapes_and_gradients(size, recompute):
    net = tiny(ape=True, drop_path_rate=0.1, use_checkpoint=recompute)
    out = net(torch.randn(2, 3, *size))
    assert list(out) == ["p0", "p1", "p2", "p3"]
    for name, shape in net.output_shape().items():
        expected = (2, shape.channels, *(-(-side // shape.stride) for side in size))
        assert out[name].shape == expected
    sum(v.square().mean() for v in out.values()).backward()
    assert [n for n, p in net.named_parameters() if p.grad is None] == []


def test_recomputing_changes_nothing():
    torch.manual_seed(0)
    plain, saving = tiny(), tiny(use_checkpoint=True)
    saving.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 64, 64)
    for net in (plain, saving):
        net(x)["p3"].square().sum().backward()
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize(
    ("frozen_stages", "prefixes"),
    [
        (-1, ()),
        (0, ("patch_embed",)),
        (1, ("patch_embed", "absolute")),
        (3, ("patch_embed", "absolute", "layers.0", "layers.1")),
    ],
)
def test_freezing(frozen_stages, prefixes):
    net = tiny(ape=True, frozen_stages=frozen_stages, drop_rate=0.5)
    for name, parameter in net.named_parameters():
        assert parameter.requires_grad != name.startswith(prefixes or "none"), name
    assert net.train().pos_drop.p == (0.0 if frozen_stages >= 2 else 0.5)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"out_indices": (0, 4)}, "out_indices"),
        ({"num_heads": (1, 2)}, "num_heads"),
        ({"num_heads": (3, 3, 3, 3)}, "heads"),
    ],
)
def test_wrong_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny(**kwargs)
