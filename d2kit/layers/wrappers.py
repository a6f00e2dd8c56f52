"""Thin additions to torch.nn, and the shape of a feature map known when a model is built."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from d2kit.layers.batch_norm import FrozenBatchNorm2d
from d2kit.utils.devices import upload
from d2kit.utils.registry import nearest_names

__all__ = [
    "BatchNorm2d",
    "Conv2d",
    "ConvTranspose2d",
    "Linear",
    "ShapeSpec",
    "cat",
    "conv3x3",
    "cross_entropy",
    "empty_input_loss_func_wrapper",
    "interpolate",
    "move_device_like",
    "nonzero_tuple",
    "shapes_to_tensor",
]


@dataclass
class ShapeSpec:
    """What one module tells the next about its output.

    Args:
        channels: C; None where unknown.
        height: H in pixels; None where it depends on the image.
        width: W in pixels; None where it depends on the image.
        stride: pixels of the input image per pixel of the feature map.
    """

    channels: int | None = None
    height: int | None = None
    width: int | None = None
    stride: int | None = None


def shapes_of(names: Sequence[str], shapes: Mapping[str, ShapeSpec], key: str) -> list[ShapeSpec]:
    """Return the shapes of some of the backbone's levels.

    Args:
        names: of the levels.
        shapes: feature name -> its shape, as the backbone gives it.
        key: the config key that holds `names`, for the message.

    Raises:
        ValueError: if there is no such level.
    """
    unknown = [name for name in names if name not in shapes]
    if unknown:
        raise ValueError(
            f"{key} names {unknown}, which the backbone does not give; it "
            f"gives {sorted(shapes)} (nearest: {nearest_names(unknown[0], shapes)})"
        )
    return [shapes[name] for name in names]


def region_shape(shape: ShapeSpec, what: str) -> tuple[int, int, int]:
    """Return channels, height and width of one region's features; the sides default to 1.

    Args:
        shape: what a pooler or a head states.
        what: who asks, for the message.

    Raises:
        ValueError: if the channels are not known.
    """
    if shape.channels is None:
        raise ValueError(f"{what} needs the channels of its input, got {shape}")
    return shape.channels, shape.height or 1, shape.width or 1


# torch accepts empty batches in all of these today; the names stay for the code that imports them
BatchNorm2d = nn.BatchNorm2d
ConvTranspose2d = nn.ConvTranspose2d
Linear = nn.Linear
interpolate = F.interpolate


def shapes_to_tensor(x: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Return the integers `x` as an int64 tensor on `device`."""
    return torch.as_tensor([int(v) for v in x], dtype=torch.int64, device=device)


def cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Concatenate along `dim`; a single tensor is returned as it is, not copied."""
    if not isinstance(tensors, list | tuple):
        raise TypeError(f"cat: expected a list or tuple of tensors, got {type(tensors).__name__}")
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def empty_input_loss_func_wrapper(loss_func: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap `loss_func(input, target, *, reduction, **kwargs)` so that no input gives 0, not NaN."""

    @functools.wraps(loss_func)
    def mean_or_zero(
        input: Tensor, target: Tensor, *, reduction: str = "mean", **kwargs: object
    ) -> Tensor:
        if reduction != "mean" or target.numel() > 0:
            return loss_func(input, target, reduction=reduction, **kwargs)
        nothing = input.sum()  # of no element: 0, but with a gradient, which DDP waits for
        return nothing * 0.0

    return mean_or_zero


cross_entropy = empty_input_loss_func_wrapper(F.cross_entropy)


def nonzero_tuple(x: Tensor) -> tuple[Tensor, ...]:
    """Return the indices of non-zero elements, one int64 tensor per axis; a scalar is 1-D."""
    return (x.unsqueeze(0) if x.dim() == 0 else x).nonzero(as_tuple=True)


def move_device_like(src: Tensor, dst: Tensor) -> Tensor:
    """Return `src` on the device of `dst`."""
    return upload(src, dst.device)


class _NewEmptyTensorOp(torch.autograd.Function):
    """An empty output of a given shape that lets gradients of an empty batch pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, new_shape: Sequence[int]) -> Tensor:  # type: ignore[override]
        ctx.input_size = x.size()
        return torch.empty(tuple(new_shape), dtype=x.dtype, device=x.device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return torch.zeros(ctx.input_size, dtype=grad.dtype, device=grad.device), None


class Conv2d(nn.Conv2d):
    """torch.nn.Conv2d followed by an optional norm and an optional activation.

    Args:
        *args: as of torch.nn.Conv2d.
        norm: a module applied to the convolution's output, or None.
        activation: a function or module applied last, or None.
        **kwargs: as of torch.nn.Conv2d.
    """

    def __init__(
        self,
        *args: Any,
        norm: nn.Module | None = None,
        activation: Callable[[Tensor], Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.norm = norm
        self.activation = activation

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        plain = (  # asked each time: some code changes strides and dilations of a built model
            self.kernel_size == (3, 3)
            and self.stride == self.dilation == (1, 1)
            and self.padding in ((1, 1), "same")
            and self.padding_mode == "zeros"
            and self.groups == 1
        )
        if plain and tiles_pay(input, weight):
            return conv3x3(input, weight, bias)
        result: Tensor = super()._conv_forward(input, weight, bias)
        return result

    def forward(self, x: Tensor) -> Tensor:
        """Apply convolution, norm and activation to `x` (N, C, H, W)."""
        norm = self.norm
        if type(norm) is FrozenBatchNorm2d and not (norm._forward_hooks or norm._forward_pre_hooks):
            # Scaling the weights costs nothing beside a pass over the output: 64 to 256 channels,
            # 1x1, 100x150 pixels, one thread: 9 ms instead of 24.
            scale, shift = norm.affine()
            if self.bias is not None:
                shift = shift + self.bias * scale
            x = self._conv_forward(x, self.weight * scale[:, None, None, None], shift)
        else:
            x = self._conv_forward(x, self.weight, self.bias)
            if norm is not None:
                x = norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x


# ---- 3x3 convolutions on the CPU with a quarter of the multiplications
#
# Winograd's minimal filtering F(4x4, 3x3) (Lavin and Gray, Fast Algorithms for Convolutional Neural
# Networks, 2016, section 4): tiles of 6 x 6 pixels and the kernel are evaluated at 36 points, the
# products at a point are one matrix product over channels, and from them 4 x 4 pixels are computed.
# The usual points (0, 1, -1, 2, -2) lose a decimal of float32. These transforms are matrix products
# too, so that any points cost the same, and 0, +-5/8, +-3/2 keep the error small (root mean square,
# 256 channels: 8.6e-7 of the output's deviation; the direct sum 6.0e-7 on AVX2, 1.6e-7 on AVX512).

POINTS = (0.0, 0.625, -0.625, 1.5, -1.5)  # and infinity
OUT = 4  # pixels of a tile's side that are computed
IN = OUT + 2  # pixels of a tile's side that are read
BLOCK = 8192  # tiles times channels that are transformed at a time: a core's own cache holds them
GROUP = 131_072  # the same whose products are taken at a time: matrix products like long sides
# What pays, measured on AVX2 cores with one and two threads, with and without a backward pass
FEWEST_TILES = 150  # of a batch; with fewer the map of the kernel costs what the products save
FEWEST_VALUES = 40_000  # tiles times channels
FEWEST_CHANNELS = 128
MANY_CHANNELS = 256  # with fewer the tiles may reach over the border by
LARGEST_SPARE = 1.15  # times the pixels: 14 x 14 take 16 x 16, 1.3 times


@functools.cache
def _transforms() -> tuple[Tensor, Tensor, Tensor]:
    """Return the maps of a tile (36, 36), a kernel (36, 9) and a result (16, 36), float32."""
    points = np.array(POINTS)
    tile, kernel, result = np.zeros((IN, IN)), np.zeros((IN, 3)), np.zeros((OUT, IN))
    for i, point in enumerate(points):
        others = np.delete(points, i)
        tile[i, : IN - 1] = np.poly(others)[::-1]
        kernel[i] = point ** np.arange(3) / np.prod(point - others)
        result[:, i] = point ** np.arange(OUT)
    tile[-1], kernel[-1, -1], result[-1, -1] = np.poly(points)[::-1], 1, 1
    both = (np.kron(one, one) for one in (tile, kernel, result))
    with torch.inference_mode(mode=False):  # kept for calls with gradients too
        first, second, third = (torch.from_numpy(one).float() for one in both)
    return first, second, third


def tiles_pay(x: Tensor, weight: Tensor) -> bool:
    """Tell whether `conv3x3` is the faster way for these, and nothing looks into the operations.

    Args:
        x: (N, C, H, W).
        weight: (K, C, 3, 3) of a convolution of stride 1 and padding 1, in one group.
    """
    if x.device.type != "cpu" or torch.jit.is_tracing() or torch.compiler.is_compiling():
        return False
    if type(x) is not Tensor:  # a fake or a wrapped one, whose operations are looked at
        return False
    if x.dim() != 4 or not x.dtype == weight.dtype == torch.float32:
        return False
    height, width = x.shape[2:]
    tiles = len(x) * -(-height // OUT) * -(-width // OUT)
    channels = min(weight.shape[:2])
    spare = tiles * OUT * OUT / max(len(x) * height * width, 1)
    return (
        tiles >= FEWEST_TILES
        and channels >= FEWEST_CHANNELS
        and tiles * channels >= FEWEST_VALUES
        and (channels >= MANY_CHANNELS or spare <= LARGEST_SPARE)
        and not torch.is_autocast_enabled("cpu")
    )


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve with kernels of 3 x 3, stride 1 and padding 1, as `F.conv2d` does.

    Args:
        x: (N, C, H, W) float32 on the CPU, none of them 0.
        weight: (K, C, 3, 3) float32.
        bias: (K,) float32, or None.

    Returns:
        (N, K, H, W) float32 in the memory layout of `x`; differs from `F.conv2d` by rounding.
    """
    needed = (x, weight) if bias is None else (x, weight, bias)
    if torch.is_grad_enabled() and any(one.requires_grad for one in needed):
        result: Tensor = _Conv3x3.apply(x, weight, bias)
        return result
    return _convolve(x, weight, bias)


class _Conv3x3(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        return _convolve(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        for_x = for_weight = for_bias = None
        twice = torch.is_grad_enabled()  # a gradient of the gradient is wanted: torch's own ways
        if ctx.needs_input_grad[0]:
            turned = weight.flip(2, 3).transpose(0, 1)
            for_x = F.conv2d(grad, turned, padding=1) if twice else _convolve(grad, turned, None)
        if ctx.needs_input_grad[1]:
            if twice:
                for_weight = conv2d_weight(x, weight.shape, grad, padding=1)
            else:
                for_weight = _weight_gradient(x, grad)
        if ctx.needs_input_grad[2]:
            for_bias = grad.sum((0, 2, 3))
        return for_x, for_weight, for_bias


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the convolution (N, K, H, W), without a gradient."""
    to_points, of_kernel, to_pixels = _transforms()
    kernel = (of_kernel @ weight.permute(2, 3, 0, 1).reshape(9, -1)).view(IN * IN, -1, x.shape[1])
    outputs = len(weight)
    wide = max(x.shape[1], outputs)
    source = _Tiles(x, IN, 1, wide)
    whole = torch.empty(
        (source.count, outputs, source.down * OUT, source.across * OUT),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )
    result = whole.permute(0, 2, 3, 1).unflatten(2, (source.across, OUT))
    result = result.unflatten(1, (source.down, OUT))
    small = x.new_empty(IN * IN * source.most * wide)
    before = x.new_empty(IN * IN, source.largest * source.channels)
    after = x.new_empty(IN * IN, source.largest * outputs)
    for group in source.groups:
        evaluated = source.evaluate(group, to_points, small, before)
        number = evaluated.shape[1]
        products = after[:, : number * outputs].view(IN * IN, number, -1)
        torch.bmm(evaluated, kernel.transpose(1, 2), out=products)
        start = 0
        for block in group:
            place = result[block.images, block.rows, :, block.columns]
            stop = start + math.prod(block.sizes) * outputs
            pixels = small[: (stop - start) * OUT * OUT].view(OUT * OUT, -1)
            torch.mm(to_pixels, after[:, start:stop], out=pixels)
            start = stop
            found = pixels.view(OUT, OUT, *block.sizes, outputs).permute(2, 3, 0, 4, 1, 5)
            if bias is None:
                place.copy_(found)
            else:
                torch.add(found, bias, out=place)
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    if last and whole.shape[2:] == x.shape[2:]:
        return whole
    # A copy, never a view: what follows may work in place on it
    layout = torch.channels_last if last else torch.contiguous_format
    return whole[:, :, : x.shape[2], : x.shape[3]].clone(memory_format=layout)


def _weight_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient (K, C, 3, 3) of the kernels, by the transposed maps of `_convolve`."""
    to_points, of_kernel, to_pixels = _transforms()
    wide = max(x.shape[1], grad.shape[1])
    sources = _Tiles(x, IN, 1, wide), _Tiles(grad, OUT, 0, wide)
    maps = to_points, to_pixels.T.contiguous()
    small = x.new_empty(IN * IN * sources[0].most * wide)
    large = [x.new_empty(IN * IN, one.largest * one.channels) for one in sources]
    kernel = x.new_zeros(IN * IN, x.shape[1], grad.shape[1])
    for group in sources[0].groups:
        points, slopes = (
            source.evaluate(group, change, small, into)
            for source, change, into in zip(sources, maps, large, strict=True)
        )
        kernel.baddbmm_(points.transpose(1, 2), slopes)
    found = of_kernel.T @ kernel.view(IN * IN, -1)
    return found.view(3, 3, x.shape[1], grad.shape[1]).permute(3, 2, 0, 1).contiguous()


class _Block(NamedTuple):
    """Images, rows and columns of tiles that are transformed at a time."""

    images: slice
    rows: slice
    columns: slice

    @property
    def sizes(self) -> tuple[int, int, int]:
        """How many images, rows and columns."""
        images, rows, columns = (one.stop - one.start for one in self)
        return images, rows, columns


class _Tiles:
    """Windows of `side` pixels every `OUT` pixels of a map (N, C, H, W), read block by block.

    `groups` are the blocks whose products are taken at a time; `most` is the number of tiles of
    the largest block, `largest` that of the largest group.
    """

    def __init__(self, x: Tensor, side: int, border: int, channels: int) -> None:
        self.map, self.side, self.border = x.permute(0, 2, 3, 1), side, border
        self.count, height, width, self.channels = self.map.shape
        self.down, self.across = -(-height // OUT), -(-width // OUT)
        tiles = max(BLOCK // channels, 1)
        columns = min(-(-self.across // -(-self.across // tiles)), self.across)
        rows = min(max(tiles // columns, 1), self.down)
        images = min(max(tiles // (columns * self.down), 1), self.count)
        self.most = images * rows * columns
        blocks = [
            _Block(*parts)
            for parts in product(
                _parts(self.count, images), _parts(self.down, rows), _parts(self.across, columns)
            )
        ]
        together = max(GROUP // channels // self.most, 1)
        self.groups = [blocks[i : i + together] for i in range(0, len(blocks), together)]
        self.largest = min(together, len(blocks)) * self.most
        strip = (images, (rows - 1) * OUT + side, (columns - 1) * OUT + side, self.channels)
        self.strip = x.new_empty(strip)

    def evaluate(self, group: list[_Block], change: Tensor, memory: Tensor, into: Tensor) -> Tensor:
        """Map the tiles of a group to points: (36, tiles, C), in `into`, which has 36 rows."""
        stop = 0
        for block in group:
            tiles = self.read(block, memory)
            start, stop = stop, stop + tiles.shape[1]
            torch.mm(change, tiles, out=into[:, start:stop])
        return into[:, :stop].view(len(into), -1, self.channels)

    def read(self, block: _Block, memory: Tensor) -> Tensor:
        """Return the tiles of a block as (side * side, tiles * C), in `memory`."""
        images, rows, columns = block.sizes
        high, wide = (rows - 1) * OUT + self.side, (columns - 1) * OUT + self.side
        strip = self.strip[:images, :high, :wide]
        inside, outside = [], []
        for tiles, length, size in ((block.rows, high, 1), (block.columns, wide, 2)):
            first = tiles.start * OUT - self.border
            start, stop = max(first, 0), min(first + length, self.map.shape[size])
            outside.append(slice(start, stop))
            inside.append(slice(start - first, stop - first))
        if inside != [slice(0, high), slice(0, wide)]:
            strip.zero_()  # what lies outside of the map is 0
        strip[:, inside[0], inside[1]] = self.map[block.images, outside[0], outside[1]]
        image, row, pixel, channel = strip.stride()
        shape = (self.side, self.side, *block.sizes, self.channels)
        strides = (row, pixel, image, OUT * row, OUT * pixel, channel)
        taken = memory[: math.prod(shape)].view(shape)
        taken.copy_(strip.as_strided(shape, strides))
        return taken.view(self.side * self.side, -1)


def _parts(length: int, size: int) -> list[slice]:
    """Return slices of at most `size` that cover `length`."""
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]
