"""RoIAlign, fast on the CPU too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torchvision  # noqa: F401, its operators
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.utils import _pair

from d2kit.utils.devices import is_symbolic

__all__ = ["ROIAlign", "roi_align"]


_TAPS_AT_ONCE = 1 << 23  # 64 MB of indices and weights


class Taps(NamedTuple):
    """Sums of rows: bag i adds ``weight[k] * rows[row[k]]``, k from offset[i] to offset[i + 1]."""

    row: Tensor  # (T,) int32 or int64
    offset: Tensor  # (bags,) of the same dtype
    weight: Tensor  # (T,) float


def roi_align_cpu(
    features: Tensor,
    rois: Tensor,
    output_size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """Pool RoIs from a feature map, with gradient to the feature map.

    The taps are found on the CPU. On a device their sums and, sorted by row, those of the gradient
    have a fixed order; torchvision's kernel adds the gradient up by atomics, in any order.

    Args:
        features: (N, C, H, W) float; channels_last saves a copy.
        rois: (R, 5): index of the image, then XYXY in pixels of the image.
        output_size: (height, width) in bins.
        spatial_scale: pixels of the feature map per pixel of the boxes.
        sampling_ratio: samples per bin and axis; 0 or less takes one per pixel of the feature map.
        aligned: whether pixel centres lie at half-integer coordinates.

    Returns:
        (R, C, height, width) of the dtype of `features`, channels_last in memory.
    """
    n, channels, height, width = features.shape
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    rows = features.permute(0, 2, 3, 1).reshape(-1, channels).to(dtype).contiguous()
    rois = rois.detach().to("cpu", dtype)
    low = rois[:, 1:3] * spatial_scale - (0.5 if aligned else 0.0)
    size = rois[:, 3:5] * spatial_scale - (0.5 if aligned else 0.0) - low
    if not aligned:
        size = size.clamp(min=1)
    bins = torch.tensor([output_size[1], output_size[0]])
    steps = size / bins
    samples = sample_counts(steps, sampling_ratio)
    # a bin of b pixels has at most b + 2 taps per axis, and two per sample
    most = torch.minimum(2 * samples, steps.abs().ceil().nan_to_num(0, 0, 0).long() + 2)
    tap_counts = most.prod(dim=1) * bins.prod()
    pooled = []
    for part in parts_of(tap_counts):
        image = rois[part, 0].long()
        x = axis_taps(low[part, 0], steps[part, 0], output_size[1], samples[part, 0], width)
        y = axis_taps(low[part, 1], steps[part, 1], output_size[0], samples[part, 1], height)
        start = image[:, None, None] * (height * width)
        mean = 1 / samples[part].clamp(min=1).prod(dim=1).to(dtype)
        taps = _outer((start + y[0] * width, y[1] * mean[:, None, None], y[2]), x, len(rows))
        pooled.append(sum_rows(rows, Taps(*(part.to(rows.device) for part in taps))))
    out = pooled[0] if len(pooled) == 1 else torch.cat(pooled)
    out = out.view(len(rois), *output_size, channels).permute(0, 3, 1, 2)
    return out.to(features.dtype)


def sample_counts(steps: Tensor, sampling_ratio: int) -> Tensor:
    """Return the number of samples per bin, int64 of the shape of `steps` (bin sizes in pixels)."""
    if sampling_ratio > 0:
        return torch.full_like(steps, sampling_ratio, dtype=torch.int64)
    return steps.ceil().nan_to_num(0, 0, 0).long().clamp(min=0)


def parts_of(tap_counts: Tensor) -> list[slice]:
    """Cut a list of RoIs that need so many taps into parts of bounded memory, at least one."""
    if int(tap_counts.sum()) <= _TAPS_AT_ONCE:
        return [slice(0, len(tap_counts))]
    number = tap_counts.cumsum(0).div(_TAPS_AT_ONCE, rounding_mode="floor")
    sizes = number.unique_consecutive(return_counts=True)[1]
    ends = sizes.cumsum(0).tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def axis_taps(
    low: Tensor, step: Tensor, bins: int, samples: Tensor, pixels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the pixels and weights of the bins of RoIs along one axis.

    Args:
        low: (R,) where RoIs begin, in pixels of the feature map, a pixel's centre at its index.
        step: (R,) sizes of bins in pixels; may be negative.
        bins: P bins.
        samples: (R,) samples per bin.
        pixels: S pixels on the axis.

    Returns:
        Indices (R, P, L) int64 in [0, S), ascending, 0 beyond the last tap; their weights (R, P, L)
        in the sum of the samples; the number of taps of the longest bin of each RoI, (R,).
    """
    most = int(samples.max()) if len(samples) else 1
    k = torch.arange(max(most, 1))
    n = samples.clamp(min=1)[:, None, None]
    order = torch.minimum(k, n - 1)
    step = step[:, None, None]
    order = torch.where(step < 0, n - 1 - order, order)  # positions always ascend
    bin_start = low[:, None, None] + torch.arange(bins)[:, None] * step
    position = bin_start + (order + 0.5) * step / n
    # a sample more than a pixel outside counts as 0, one less than that as the border
    used = (position >= -1) & (position <= pixels) & (k < samples[:, None, None])
    position = position.nan_to_num(0, 0, 0).clamp(0, pixels - 1)
    below = position.floor().long()
    fraction = position - below
    counts = used.to(low.dtype)
    # neighbours that share pixels share taps: the next sample begins 0, 1 or 2 taps further
    slot = torch.zeros_like(below)
    slot[..., 1:] = (below[..., 1:] - below[..., :-1]).clamp(max=2)
    slot = slot.cumsum(dim=2)
    length = slot[..., -1].amax(dim=1) + 2
    longest = int(length.max()) if len(length) else 2
    index = torch.zeros((*below.shape[:2], longest), dtype=torch.int64)
    index.scatter_(2, slot + 1, (below + 1).clamp(max=pixels - 1)).scatter_(2, slot, below)
    weight = torch.zeros(index.shape, dtype=low.dtype)
    weight.scatter_add_(2, slot, (1 - fraction) * counts)
    weight.scatter_add_(2, slot + 1, fraction * counts)
    return index, weight, length


def _rounded(length: Tensor) -> Tensor:
    """Round numbers of taps up, so that few different ones remain: 2...8, 10...16, 20, 24, ..."""
    step = torch.where(length <= 8, 1, torch.where(length <= 16, 2, 4))
    return (length + step - 1).div(step, rounding_mode="floor") * step


def _outer(
    y: tuple[Tensor, Tensor, Tensor], x: tuple[Tensor, Tensor, Tensor], row_count: int
) -> Taps:
    """Combine the taps of the two axes.

    Args:
        y: taps of rows as of `axis_taps`, indices already multiplied by the width.
        x: taps of columns.
        row_count: number of rows that the indices may address.

    Returns:
        One bag per RoI, bin row and bin column, in this order.
    """
    (y_index, y_weight, y_length), (x_index, x_weight, x_length) = y, x
    integer = torch.int32 if row_count < 1 << 31 else torch.int64
    y_index, x_index = y_index.to(integer), x_index.to(integer)
    count, bins_y, bins_x = len(y_index), y_index.shape[1], x_index.shape[1]
    y_length = _rounded(y_length).clamp(max=y_index.shape[2])
    x_length = _rounded(x_length).clamp(max=x_index.shape[2])
    per_bin = y_length * x_length
    ends = (per_bin * (bins_y * bins_x)).cumsum(0)
    starts = ends - per_bin * (bins_y * bins_x)
    total = int(ends[-1]) if count else 0
    index = torch.empty(total, dtype=integer)
    weight = torch.empty(total, dtype=y_weight.dtype)
    key = y_length * (x_index.shape[2] + 1) + x_length
    order = key.argsort()
    keys, sizes = key[order].unique_consecutive(return_counts=True)
    # RoIs of the same extent are expanded together
    for k, group in zip(keys.tolist(), order.split(sizes.tolist()), strict=True):
        ny, nx = divmod(k, x_index.shape[2] + 1)
        place = starts[group, None] + torch.arange(bins_y * bins_x * ny * nx)
        rows, columns = y_index[group, :, None, :ny, None], x_index[group, None, :, None, :nx]
        index[place] = (rows + columns).flatten(1)
        rows, columns = y_weight[group, :, None, :ny, None], x_weight[group, None, :, None, :nx]
        weight[place] = (rows * columns).flatten(1)
    offset = starts[:, None] + torch.arange(bins_y * bins_x) * per_bin[:, None]
    return Taps(index, offset.flatten().to(integer), weight)


def _transposed(taps: Taps, row_count: int) -> Taps:
    """Return the taps of the gradient: one bag per row, over the bags that use it."""
    index, offset, weight = taps
    sizes = torch.diff(offset, append=torch.full_like(offset[:1], len(index)))
    bag = torch.repeat_interleave(_range(len(offset), index), sizes, output_size=len(index))
    ascending, order = index.sort(stable=True)
    starts = torch.searchsorted(ascending, _range(row_count, index))
    return Taps(bag[order], starts.to(index.dtype), weight[order])


def _range(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, dtype=like.dtype, device=like.device)


def sum_rows(rows: Tensor, taps: Taps) -> Tensor:
    """Return the weighted sums of rows (H*W, C) that `taps` name, (bags, C), differentiable."""
    summed: Tensor = _SumRows.apply(rows, *taps)
    return summed


class _SumRows(torch.autograd.Function):
    """Weighted sums of rows; torch's own backward of `embedding_bag` takes 1.9 times as long."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, offset: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(index, offset, weight)
        ctx.row_count = len(rows)
        return F.embedding_bag(index, rows, offset, per_sample_weights=weight, mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        taps = _transposed(Taps(*ctx.saved_tensors), ctx.row_count)
        grad_rows = F.embedding_bag(
            taps.row, grad.contiguous(), taps.offset, per_sample_weights=taps.weight, mode="sum"
        )
        return grad_rows, None, None, None


def roi_align(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """Pool each RoI to a grid of bins by averaging bilinear samples.

    Boxes keep their precision where the feature map is half or bfloat16.

    Args:
        input: (N, C, H, W) feature map; on the CPU, channels_last is fastest.
        boxes: (R, 5): index of the image, then XYXY in pixels of the image; or N tensors (R_i, 4).
        output_size: P, or (height, width) of the output in bins.
        spatial_scale: pixels of the feature map per pixel of the boxes.
        sampling_ratio: samples per bin and axis; 0 or less takes one per pixel of the feature map.
        aligned: whether pixel centres lie at half-integer coordinates, as they do in d2kit.

    Returns:
        (R, C, height, width) of the dtype of `input`.

    Raises:
        ValueError: if the shapes are others.

    Source: He et al., Mask R-CNN (2017), section 3.
    """
    rois = boxes if isinstance(boxes, Tensor) else _with_image_index(boxes)
    if input.dim() != 4 or rois.dim() != 2 or rois.shape[1] != 5:
        raise ValueError(
            "roi_align: expected a feature map (N, C, H, W) and boxes (R, 5), "
            f"got {tuple(input.shape)} and {tuple(rois.shape)}"
        )
    size = _pair(output_size)
    deterministic = torch.are_deterministic_algorithms_enabled()
    by_taps = input.device.type == "cpu" or (deterministic and input.requires_grad)
    if by_taps and not is_symbolic():
        return roi_align_cpu(input, rois, size, spatial_scale, sampling_ratio, aligned)
    exact = input if input.dtype == torch.float64 else input.float()
    # The operator itself: torchvision's function would take a version that is compiled at run time
    # where algorithms must be deterministic, and forward this one is.
    operator: Any = torch.ops.torchvision.roi_align
    pooled = operator(exact, rois.to(exact.dtype), spatial_scale, *size, sampling_ratio, aligned)
    found: Tensor = pooled.to(input.dtype)
    return found


def _with_image_index(boxes: Sequence[Tensor]) -> Tensor:
    """Return boxes of N images, (R_i, 4) each, as (R, 5) with the index of the image."""
    return torch.cat(
        [torch.cat([b.new_full((len(b), 1), i), b], dim=1) for i, b in enumerate(boxes)]
    )


class ROIAlign(nn.Module):
    """RoIAlign as a module.

    Args:
        output_size: P, or (height, width) of the output in bins.
        spatial_scale: pixels of the feature map per pixel of the boxes.
        sampling_ratio: samples per bin and axis; 0 takes one per pixel of the feature map.
        aligned: whether pixel centres lie at half-integer coordinates, as they do in d2kit.

    Source: He et al., Mask R-CNN (2017), section 3.
    """

    def __init__(
        self,
        output_size: int | tuple[int, int],
        spatial_scale: float,
        sampling_ratio: int,
        aligned: bool = True,
    ) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """Pool each RoI.

        Args:
            input: (N, C, H, W) feature map.
            rois: (R, 5): index of the image, then XYXY in pixels of the image.

        Returns:
            (R, C, P, P).
        """
        return roi_align(
            input,
            rois,
            self.output_size,
            self.spatial_scale,
            self.sampling_ratio,
            self.aligned,
        )

    def extra_repr(self) -> str:
        """List the settings."""
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}, aligned={self.aligned}"
        )
