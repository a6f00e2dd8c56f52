"""RoIAlign, fast on the CPU too."""

from collections.abc import Sequence
from typing import Any

import torch
import torchvision  # noqa: F401, its operators
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from d2kit.layers._roi_align_cpu import roi_align_cpu
from d2kit.utils.tracing import is_symbolic

__all__ = ["ROIAlign", "roi_align"]


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
    return pooled.to(input.dtype)


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
