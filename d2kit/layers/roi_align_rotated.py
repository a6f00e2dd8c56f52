"""RoIAlign of rotated boxes in plain torch."""

import math

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from d2kit.layers.roi_align import Taps, parts_of, sample_counts, sum_rows

__all__ = ["ROIAlignRotated", "roi_align_rotated"]


def roi_align_rotated(
    input: Tensor,
    rois: Tensor,
    output_size: int | tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
) -> Tensor:
    """Pool each rotated RoI to a grid of bins by averaging bilinear samples.

    Args:
        input: (N, C, H, W) feature map.
        rois: (R, 6): index of the image, centre x and y, width, height in pixels of the image, and
            the angle in degrees counter-clockwise as seen in the image.
        output_size: P, or (height, width) of the output in bins.
        spatial_scale: pixels of the feature map per pixel of the boxes.
        sampling_ratio: samples per bin and axis; 0 or less takes one per pixel of the feature map.

    Returns:
        (R, C, height, width) of the dtype of `input`.

    Raises:
        ValueError: if the shapes are others.

    Source: Ma et al., Arbitrary-Oriented Scene Text Detection via Rotation Proposals (2018), with
    the sampling of He et al., Mask R-CNN (2017), section 3.
    """
    if input.dim() != 4 or rois.dim() != 2 or rois.shape[1] != 6:
        raise ValueError(
            "roi_align_rotated: expected a feature map (N, C, H, W) and boxes (R, 6), "
            f"got {tuple(input.shape)} and {tuple(rois.shape)}"
        )
    _, channels, height, width = input.shape
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    rows = input.permute(0, 2, 3, 1).reshape(-1, channels).to(dtype).contiguous()
    rois = rois.detach().to(dtype)
    size = _pair(output_size)
    bins = torch.tensor(size, device=rois.device)
    steps = rois[:, [4, 3]] * spatial_scale / bins  # of y, of x
    samples = sample_counts(steps, sampling_ratio)
    pooled = []
    for part in parts_of(samples.prod(dim=1) * (4 * size[0] * size[1])):
        y, x, roi, ends = _positions(rois[part], steps[part], samples[part], size, spatial_scale)
        share = 1 / samples[part].clamp(min=1).prod(dim=1).to(dtype)
        start = rois[part, 0].long() * (height * width)
        index, weight = _bilinear(y, x, (height, width))
        pooled.append(
            sum_rows(
                rows,
                Taps(
                    (index + start[roi, None]).flatten(),
                    4 * ends,
                    (weight * share[roi, None]).flatten(),
                ),
            )
        )
    out = pooled[0] if len(pooled) == 1 else torch.cat(pooled)
    return out.view(len(rois), *size, channels).permute(0, 3, 1, 2).to(input.dtype)


def _positions(
    rois: Tensor, steps: Tensor, samples: Tensor, size: tuple[int, int], spatial_scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """List all samples, bin after bin.

    Args:
        rois: (R, 6).
        steps: (R, 2) height and width of bins in pixels of the feature map.
        samples: (R, 2) samples per bin along height and width.
        size: bins along height and width.
        spatial_scale: pixels of the feature map per pixel of the boxes.

    Returns:
        y and x of S samples in pixels of the feature map, the RoI of each, and for each bin the
        number of its first sample, (R * bins,).
    """
    device = rois.device
    bins = size[0] * size[1]
    per_bin = samples.prod(dim=1).repeat_interleave(bins)
    first = per_bin.cumsum(0) - per_bin
    bag = torch.repeat_interleave(torch.arange(len(per_bin), device=device), per_bin)
    roi = bag.div(bins, rounding_mode="floor")
    bin_y = (bag % bins).div(size[1], rounding_mode="floor")
    bin_x = bag % size[1]
    number = torch.arange(len(bag), device=device) - first[bag]
    count_y, count_x = samples[roi].unbind(1)
    step_y, step_x = steps[roi].unbind(1)
    sample_y = number.div(count_x, rounding_mode="floor") + 0.5
    sample_x = number % count_x + 0.5
    # in the axes of the box, about its centre
    down = (bin_y - size[0] / 2 + sample_y / count_y) * step_y
    right = (bin_x - size[1] / 2 + sample_x / count_x) * step_x
    angle = rois[:, 5] * (math.pi / 180.0)
    cos, sin = angle.cos()[roi], angle.sin()[roi]
    centre = rois[:, 1:3] * spatial_scale - 0.5
    y = down * cos - right * sin + centre[roi, 1]
    x = down * sin + right * cos + centre[roi, 0]
    return y, x, roi, first


def _bilinear(y: Tensor, x: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return the four pixels (S, 4) int64 around S positions and their weights (S, 4).

    A position more than a pixel outside weighs 0, one less than that takes the border.
    """
    height, width = size
    used = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    y = y.nan_to_num(0, 0, 0).clamp(0, height - 1)
    x = x.nan_to_num(0, 0, 0).clamp(0, width - 1)
    top, left = y.floor().long(), x.floor().long()
    bottom, right = (top + 1).clamp(max=height - 1), (left + 1).clamp(max=width - 1)
    fy, fx = y - top, x - left
    index = torch.stack(
        [top * width + left, top * width + right, bottom * width + left, bottom * width + right], 1
    )
    weight = torch.stack([(1 - fy) * (1 - fx), (1 - fy) * fx, fy * (1 - fx), fy * fx], dim=1)
    return index, weight * used[:, None]


class ROIAlignRotated(nn.Module):
    """RoIAlign of rotated boxes as a module; pixel centres lie at half-integer coordinates.

    Args:
        output_size: P, or (height, width) of the output in bins.
        spatial_scale: pixels of the feature map per pixel of the boxes.
        sampling_ratio: samples per bin and axis; 0 takes one per pixel of the feature map.
    """

    def __init__(
        self, output_size: int | tuple[int, int], spatial_scale: float, sampling_ratio: int
    ) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """Pool each RoI.

        Args:
            input: (N, C, H, W) feature map.
            rois: (R, 6): index of the image, then centre x and y, width, height, angle in degrees.

        Returns:
            (R, C, P, P).
        """
        return roi_align_rotated(
            input, rois, self.output_size, self.spatial_scale, self.sampling_ratio
        )

    def extra_repr(self) -> str:
        """List the settings."""
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}"
        )
