"""3x3 convolutions by tiles beside torch's: values, gradients, layouts, where they stay away."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from d2kit.layers import Conv2d, FrozenBatchNorm2d, wrappers

# images, channels in and out, height, width: whole tiles, parts of tiles, one pixel, blocks of
# several images, rows and columns, and groups of blocks
SHAPES = [
    (1, 8, 4, 1, 1),
    (1, 8, 16, 4, 4),
    (2, 16, 8, 5, 7),
    (3, 8, 8, 13, 3),
    (2, 64, 32, 33, 70),
    (40, 128, 96, 14, 14),
    (1, 256, 128, 96, 100),
]


def drawn(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Return normal values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_convolves_as_torch_does(shape: tuple[int, ...], bias: bool) -> None:
    n, c, k, h, w = shape
    x, weight = drawn((n, c, h, w)), drawn((k, c, 3, 3), 1) * (2 / 9 / c) ** 0.5
    shift = drawn((k,), 2) if bias else None
    found = wrappers.conv3x3(x, weight, shift)
    exact = F.conv2d(x.double(), weight.double(), shift if shift is None else shift.double(), 1, 1)
    assert found.shape == exact.shape
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=3e-5)


def test_loses_little() -> None:
    x, weight = drawn((1, 256, 40, 40)).relu(), drawn((64, 256, 3, 3), 1) / 34
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    # the direct sum loses 6e-7 of the deviation on AVX2 cores, 2e-7 on AVX512, which adds in blocks
    lost = (wrappers.conv3x3(x, weight) - exact).square().mean().sqrt()
    assert lost < 1.2e-6 * exact.std()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients(shape: tuple[int, ...]) -> None:
    n, c, k, h, w = shape
    values = drawn((n, c, h, w)), drawn((k, c, 3, 3), 1) * (2 / 9 / c) ** 0.5, drawn((k,), 2)
    ours = [one.clone().requires_grad_() for one in values]
    exact = [one.double().requires_grad_() for one in values]
    up = drawn((n, k, h, w), 3)
    wrappers.conv3x3(*ours).backward(up)
    F.conv2d(*exact, padding=1).backward(up.double())
    for mine, other in zip(ours, exact, strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        largest = float(other.grad.abs().max())
        assert float((mine.grad - other.grad).abs().max()) < 1e-5 * largest


def test_only_the_gradients_that_are_asked_for() -> None:
    x, weight = drawn((1, 8, 9, 9)), drawn((8, 8, 3, 3), 1).requires_grad_()
    wrappers.conv3x3(x, weight).sum().backward()
    assert x.grad is None
    assert weight.grad is not None
    assert not wrappers.conv3x3(x, weight.detach()).requires_grad


def test_gradient_of_the_gradient() -> None:
    x, weight = drawn((1, 4, 6, 6)), drawn((4, 4, 3, 3), 1) / 6
    found = []
    for convolve in (wrappers.conv3x3, lambda a, b: F.conv2d(a, b, padding=1)):
        a, b = x.clone().requires_grad_(), weight.clone().requires_grad_()
        (slope,) = torch.autograd.grad(convolve(a, b).square().sum(), a, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), (a, b)))
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_layout_stays(layout: torch.memory_format) -> None:
    x = drawn((2, 8, 12, 12)).contiguous(memory_format=layout)
    weight = drawn((16, 8, 3, 3), 1).requires_grad_()
    for size in (12, 10, 9):  # whole tiles, rows of whole tiles, parts of tiles
        part = x[:, :, :size].contiguous(memory_format=layout)
        found = wrappers.conv3x3(part, weight)
        assert found.is_contiguous(memory_format=layout)
        exact = F.conv2d(part, weight, padding=1)
        F.relu_(found)  # in place, as residual blocks do
        torch.testing.assert_close(found, exact.relu(), rtol=0, atol=1e-4)
    found.sum().backward()


def test_an_image_does_not_depend_on_its_batch() -> None:
    x, weight = drawn((3, 128, 50, 60)), drawn((128, 128, 3, 3), 1)
    together = wrappers.conv3x3(x, weight)
    for i in range(3):
        torch.testing.assert_close(together[i], wrappers.conv3x3(x[i : i + 1], weight)[0])


def test_another_default_dtype_changes_nothing() -> None:
    x, weight = drawn((1, 8, 8, 8)), drawn((8, 8, 3, 3), 1)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        found = wrappers.conv3x3(x, weight)
    finally:
        torch.set_default_dtype(before)
    assert found.dtype == torch.float32


def test_first_used_in_inference_mode() -> None:
    wrappers._transforms.cache_clear()
    x, weight = drawn((1, 8, 8, 8)), drawn((8, 8, 3, 3), 1)
    with torch.inference_mode():
        first = wrappers.conv3x3(x, weight)
    weight.requires_grad_()
    found = wrappers.conv3x3(x, weight)
    found.sum().backward()
    torch.testing.assert_close(first.clone(), found, rtol=0, atol=0)


def test_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[int, ...]] = []
    conv3x3 = wrappers.conv3x3

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        taken.append(tuple(x.shape))
        return conv3x3(x, weight, bias)

    monkeypatch.setattr(wrappers, "conv3x3", counted)
    x = drawn((1, 128, 96, 96))
    plain = Conv2d(128, 128, 3, padding=1, norm=FrozenBatchNorm2d(128), activation=F.relu)
    with torch.no_grad():
        found = plain(x)
        assert len(taken) == 1
        direct = F.conv2d(x, plain.weight, plain.bias, padding=1)
        torch.testing.assert_close(found, plain.norm(direct).relu(), rtol=0, atol=2e-5)
        for other in (
            Conv2d(128, 128, 3, padding=1, stride=2),
            Conv2d(128, 128, 3, padding=2, dilation=2),
            Conv2d(128, 128, 3),
            Conv2d(128, 128, 3, padding=1, groups=2),
            Conv2d(128, 128, 3, padding=1, padding_mode="reflect"),
            Conv2d(128, 128, 1),
            Conv2d(128, 16, 3, padding=1),
        ):
            other(x)
        plain(x[:0])
        plain(x[..., :20, :20])  # the map of the kernel costs more
        plain.double()(x.double())
        plain.float()
        with torch.autocast("cpu", torch.bfloat16):
            plain(x)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            plain(mode.from_tensor(x))
        torch.jit.trace(plain, x, check_trace=False)
        plain.stride = (2, 2)  # as code does that changes the stride of a built model
        assert plain(x).shape[-1] == 48
        plain.stride = (1, 1)
        assert len(taken) == 1
        regions = drawn((64, 256, 14, 14))  # whose tiles reach over the border
        Conv2d(128, 128, 3, padding=1)(regions[:, :128])
        assert len(taken) == 1
        Conv2d(256, 256, 3, padding=1)(regions)
        assert len(taken) == 2
    Conv2d(64, 64, 3, padding=1)(x[:, :64])
    assert len(taken) == 2
    plain(x).sum().backward()
    assert len(taken) == 3
