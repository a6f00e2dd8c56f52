"""RoIAlign, fast on the CPU too."""

import torch
import torchvision
from torch import Tensor, nn

__all__ = ["ROIAlign", "roi_align"]

roi_align = torchvision.ops.roi_align


class ROIAlign(nn.Module):
    """RoIAlign as a module.

    Args:
        output_size: P, or (height, width) of the output in bins.
        spatial_scale: pixels of the feature map per pixel of the boxes.
        sampling_ratio: samples per bin and axis; 0 takes one per pixel of the feature map.
        aligned: whether pixel centres lie at half-integer coordinates (as they do in d2kit).

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
            rois.to(input.dtype),
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
