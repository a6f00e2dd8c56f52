import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from d2kit.layers import (
    ASPP,
    CNNBlockBase,
    Conv2d,
    DeformConv,
    DepthwiseSeparableConv2d,
    FrozenBatchNorm2d,
    ModulatedDeformConv,
    NaiveSyncBatchNorm,
    ShapeSpec,
    cat,
    cross_entropy,
    empty_input_loss_func_wrapper,
    fold_batch_norm,
    get_norm,
    move_device_like,
    nonzero_tuple,
    shapes_to_tensor,
)
from d2kit.layers.wrappers import _NewEmptyTensorOp


def randomise(module):
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape) + (0.5 if "var" in name else -0.5))
    return module


@pytest.mark.parametrize("norm", ["", "BN", "FrozenBN", "GN"])
@pytest.mark.parametrize("bias", [True, False])
def test_conv_is_convolution_norm_activation(norm, bias):
    conv = Conv2d(4, 32, 3, padding=1, bias=bias, norm=get_norm(norm, 32), activation=F.relu)
    randomise(conv).eval()
    x = torch.randn(2, 4, 6, 7, requires_grad=True)
    expected = F.conv2d(x, conv.weight, conv.bias, padding=1)
    expected = F.relu(conv.norm(expected) if norm else expected)
    torch.testing.assert_close(conv(x), expected, rtol=1e-5, atol=1e-5)
    inputs = [x, *conv.parameters()]
    ours, theirs = (torch.autograd.grad(y.square().sum(), inputs) for y in (conv(x), expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert conv(torch.zeros(0, 4, 6, 7)).shape == (0, 32, 6, 7)


def test_a_hook_on_a_frozen_norm_is_called():
    conv = Conv2d(2, 3, 1, norm=FrozenBatchNorm2d(3))
    seen = []
    conv.norm.register_forward_hook(lambda module, args, out: seen.append(out))
    out = conv(torch.randn(1, 2, 2, 2))
    assert torch.equal(seen[0], out)


def test_conv_state_names():
    conv = Conv2d(2, 3, 1, bias=False, norm=FrozenBatchNorm2d(3), activation=nn.ReLU())
    buffers = ["norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"]
    assert list(conv.state_dict()) == ["weight", *buffers]


def small_network():
    return nn.Sequential(
        Conv2d(3, 8, 3, padding=1, bias=False, norm=FrozenBatchNorm2d(8), activation=F.relu),
        nn.Sequential(Conv2d(8, 8, 3, groups=2, norm=nn.BatchNorm2d(8), activation=F.relu)),
        Conv2d(8, 32, 1, norm=nn.GroupNorm(32, 32)),
        Conv2d(32, 8, 1, norm=NaiveSyncBatchNorm(8)),
        Conv2d(8, 4, 1, norm=nn.BatchNorm2d(4, affine=False)),
        Conv2d(4, 4, 1),
    )


def test_folding():
    model = randomise(small_network()).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(2, 3, 9, 8)
    expected = model(x)
    folded = fold_batch_norm(model)
    torch.testing.assert_close(folded(x), expected, rtol=1e-5, atol=1e-5)
    assert [m.norm for m in folded.modules() if isinstance(m, Conv2d)].count(None) == 5
    assert not any(isinstance(m, FrozenBatchNorm2d | nn.BatchNorm2d) for m in folded.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert list(model.state_dict()) == list(before)
    assert torch.equal(model(x), expected)


def test_folding_leaves_norms_that_are_being_trained():
    folded = fold_batch_norm(small_network().train())
    assert sum(isinstance(m, nn.BatchNorm2d) for m in folded.modules()) == 3
    assert not any(isinstance(m, FrozenBatchNorm2d) for m in folded.modules())


def test_folding_keeps_layout_and_dtype():
    conv = Conv2d(3, 8, 3, norm=FrozenBatchNorm2d(8)).bfloat16()
    folded = fold_batch_norm(conv.to(memory_format=torch.channels_last))
    assert folded.weight.dtype == folded.bias.dtype == torch.bfloat16
    assert folded.weight.is_contiguous(memory_format=torch.channels_last)


def test_freeze():
    class Block(CNNBlockBase):
        def __init__(self):
            super().__init__(3, 4, 2)
            self.conv = Conv2d(3, 4, 1, stride=2, norm=nn.BatchNorm2d(4))

    block = Block()
    assert (block.in_channels, block.out_channels, block.stride) == (3, 4, 2)
    assert block.freeze() is block
    assert isinstance(block.conv.norm, FrozenBatchNorm2d)
    assert not any(p.requires_grad for p in block.parameters())


def test_depthwise_separable():
    layer = DepthwiseSeparableConv2d(4, 6, norm1="BN", activation1=F.relu, norm2="BN")
    assert layer(torch.randn(2, 4, 5, 5)).shape == (2, 6, 5, 5)
    assert layer.depthwise.weight.shape == (4, 1, 3, 3)
    assert layer.pointwise.bias is None


@pytest.mark.parametrize("separable", [True, False])
@pytest.mark.parametrize("pool", [None, (4, 4)])
def test_aspp(separable, pool):
    layer = ASPP(
        4,
        6,
        [1, 2, 3],
        norm="BN",
        activation=F.relu,
        pool_kernel_size=pool,
        dropout=0.1,
        use_depthwise_separable_conv=separable,
    )
    assert layer(torch.randn(2, 4, 8, 8)).shape == (2, 6, 8, 8)
    assert layer.project.weight.shape == (6, 30, 1, 1)
    if pool:
        with pytest.raises(ValueError, match="multiple of pool_kernel_size"):
            layer(torch.randn(2, 4, 9, 8))
    with pytest.raises(ValueError, match="three dilations"):
        ASPP(4, 6, [1, 2], norm="", activation=F.relu)


@pytest.mark.parametrize("kind", [DeformConv, ModulatedDeformConv])
def test_deformable_without_offsets_is_a_convolution(kind):
    layer = randomise(
        kind(4, 6, 3, stride=2, padding=1, groups=2, deformable_groups=2, activation=F.relu)
    )
    x = torch.randn(2, 4, 7, 7)
    inputs = [x, torch.zeros(2, 36, 4, 4)]
    if kind is ModulatedDeformConv:
        inputs.append(torch.ones(2, 18, 4, 4))
    expected = F.relu(F.conv2d(x, layer.weight, layer.bias, stride=2, padding=1, groups=2))
    torch.testing.assert_close(layer(*inputs), expected, rtol=1e-4, atol=1e-4)
    assert "deformable_groups=2" in repr(layer)
    with_norm = randomise(kind(4, 6, 3, norm=FrozenBatchNorm2d(6))).eval()
    inputs = [x, torch.randn(2, 18, 5, 5)] + [torch.rand(2, 9, 5, 5)] * (len(inputs) - 2)
    folded = fold_batch_norm(with_norm)
    assert folded.norm is None
    torch.testing.assert_close(folded(*inputs), with_norm(*inputs), rtol=1e-4, atol=1e-4)


def test_deformable_offset_shifts_the_taps():
    layer = DeformConv(1, 1, 1)
    nn.init.ones_(layer.weight)
    x = torch.arange(20.0).view(1, 1, 4, 5)
    offset = torch.zeros(1, 2, 4, 5)
    offset[:, 0] = 1  # y comes first
    assert torch.equal(layer(x, offset)[..., :3, :], x[..., 1:, :])


def test_deformable_errors():
    with pytest.raises(ValueError, match="bias=True"):
        DeformConv(4, 4, 3, bias=True)
    with pytest.raises(ValueError, match="groups=3 must divide"):
        DeformConv(4, 6, 3, groups=3)


def test_losses_of_no_input():
    logits = torch.zeros(0, 5, requires_grad=True)
    loss = cross_entropy(logits, torch.zeros(0, dtype=torch.long), reduction="mean")
    assert loss.item() == 0
    loss.backward()
    assert logits.grad.shape == (0, 5)
    logits = torch.randn(3, 5)
    target = torch.tensor([0, 1, 4])
    assert cross_entropy(logits, target, reduction="sum") == F.cross_entropy(
        logits, target, reduction="sum"
    )
    l1 = empty_input_loss_func_wrapper(F.l1_loss)
    assert l1(torch.zeros(0), torch.zeros(0)) == 0


def test_small_functions():
    x = torch.ones(2)
    assert cat([x]) is x
    assert cat((x, x)).shape == (4,)
    with pytest.raises(TypeError, match="list or tuple"):
        cat(x)
    assert [i.tolist() for i in nonzero_tuple(torch.tensor([[0, 1], [2, 0]]))] == [[0, 1], [1, 0]]
    assert nonzero_tuple(torch.tensor(3))[0].tolist() == [0]
    assert shapes_to_tensor([3, torch.tensor(4)]).tolist() == [3, 4]
    assert move_device_like(x, torch.zeros(1)).device == x.device
    assert ShapeSpec(channels=4, stride=8) == ShapeSpec(4, None, None, 8)
    empty = torch.zeros(0, 3, requires_grad=True)
    out = _NewEmptyTensorOp.apply(empty, (0, 7))
    assert out.shape == (0, 7)
    out.sum().backward()
    assert empty.grad.shape == (0, 3)
    assert copy.deepcopy(ShapeSpec(1)).channels == 1
