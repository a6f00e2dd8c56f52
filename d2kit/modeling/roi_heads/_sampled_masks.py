"""Bitmaps of sampled regions, each ground truth held once."""

from typing import Any

import torch
from torch import Tensor

from d2kit.layers import roi_align
from d2kit.structures import BitMasks


class SampledBitMasks(BitMasks):
    """Masks of R regions that share G bitmaps.

    An image of 800x1333 with 512 sampled regions would copy 546 MB of bitmaps (and four times that
    as floating point); this keeps the G bitmaps and R indices.

    Args:
        source: (G, H, W) bool.
        index: (R,) int64, the bitmap of each region.
    """

    def __init__(self, source: Tensor, index: Tensor) -> None:
        self.source = source
        self.index = index
        self.image_size = (int(source.shape[1]), int(source.shape[2]))

    @property
    def tensor(self) -> Tensor:  # type: ignore[override]
        """The bitmap of every region (R, H, W), copied."""
        return self.source[self.index]

    def to(self, *args: Any, **kwargs: Any) -> "SampledBitMasks":
        """Return the masks after `Tensor.to(*args, **kwargs)`."""
        source = BitMasks(self.source).to(*args, **kwargs).tensor
        return SampledBitMasks(source, self.index.to(source.device))

    @property
    def device(self) -> torch.device:
        """The device of the masks."""
        return self.source.device

    def __getitem__(self, item: Any) -> BitMasks:
        """Select masks by an integer (gives one), a slice, a bool mask or indices."""
        if isinstance(item, int):
            return SampledBitMasks(self.source, self.index[item].reshape(1))
        return SampledBitMasks(self.source, self.index[item])

    def __len__(self) -> int:
        return len(self.index)

    def crop_and_resize(self, boxes: Tensor, mask_size: int) -> Tensor:
        """See `BitMasks.crop_and_resize`; the same result."""
        if len(boxes) != len(self):
            raise ValueError(f"BitMasks: expected {len(self)} boxes, got {len(boxes)}")
        index = self.index.to(torch.float32).unsqueeze(1)
        rois = torch.cat([index, boxes.to(self.device).float()], dim=1)
        return roi_align(self.source[:, None].float(), rois, mask_size, 1.0, 0, True)[:, 0] >= 0.5
