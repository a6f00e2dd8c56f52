"""A pyramid from one map. `SimpleFeaturePyramid` is re-exported by `vit`."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from d2kit.layers import Conv2d, get_norm
from d2kit.modeling.backbone.backbone import Backbone
from d2kit.modeling.backbone.fpn import _assert_strides_are_log2_contiguous
from d2kit.utils.registry import nearest_names


def _rescale(channels: int, factor: float, norm: Any) -> tuple[list[nn.Module], int]:
    """Return layers that rescale a map by 4, 2, 1 or 1/2, and the channels they leave."""
    if factor == 4.0:
        half, quarter = channels // 2, channels // 4
        up = [
            nn.ConvTranspose2d(channels, half, 2, stride=2),
            get_norm(norm, half) or nn.Identity(),
            nn.GELU(),
            nn.ConvTranspose2d(half, quarter, 2, stride=2),
        ]
        return up, quarter
    if factor == 2.0:
        return [nn.ConvTranspose2d(channels, channels // 2, 2, stride=2)], channels // 2
    if factor == 1.0:
        return [], channels
    if factor == 0.5:
        return [nn.MaxPool2d(2, stride=2)], channels
    raise ValueError(f"SimpleFeaturePyramid scale_factors must be of 4, 2, 1, 0.5, got {factor}.")


class SimpleFeaturePyramid(Backbone):
    """Levels made from one map of another backbone by (transposed) convolutions.

    Args:
        net: the backbone below.
        in_feature: name of its map.
        out_channels: channels of every level.
        scale_factors: of 4, 2, 1 and 0.5, fine to coarse: size of each level over that of the map.
        top_block: module that adds coarser levels; has `num_levels` and `in_feature`, the name of
            a feature of `net` or of this network.
        norm: as `d2kit.layers.get_norm` takes it; "" is none, with bias.
        square_pad: where positive, batches are padded to a square of that side, in pixels.

    Raises:
        ValueError: an unknown feature, other factors, or levels whose strides do not double.

    Source: Li et al., ViTDet (2022), section 3, "Simple feature pyramid".
    """

    def __init__(
        self,
        net: Backbone,
        in_feature: str,
        out_channels: int,
        scale_factors: Sequence[float],
        top_block: nn.Module | None = None,
        norm: Any = "LN",
        square_pad: int = 0,
    ) -> None:
        super().__init__()
        shapes = net.output_shape()
        if in_feature not in shapes:
            raise ValueError(
                f"SimpleFeaturePyramid in_feature: the network below has no output {in_feature!r}, "
                f"it has {list(shapes)}; nearest: {nearest_names(in_feature, shapes)}."
            )
        stride, channels = shapes[in_feature].stride or 0, shapes[in_feature].channels or 0
        layers = [_rescale(channels, factor, norm) for factor in scale_factors]
        strides = [int(stride / factor) for factor in scale_factors]
        _assert_strides_are_log2_contiguous(strides)
        self.net, self.in_feature, self.top_block = net, in_feature, top_block
        self._square_pad = square_pad
        self._size_divisibility = strides[-1]
        self._stages = [int(math.log2(s)) for s in strides]
        for stage, (rescaling, width) in zip(self._stages, layers, strict=True):
            level = nn.Sequential(
                *rescaling,
                _conv(width, out_channels, 1, norm),
                _conv(out_channels, out_channels, 3, norm),
            )
            self.add_module(f"simfp_{stage}", level)
        coarser = 0 if top_block is None else int(top_block.num_levels)  # type: ignore[arg-type]
        levels = range(self._stages[0], self._stages[-1] + 1 + coarser)
        self._out_features = [f"p{level}" for level in levels]
        self._out_feature_strides = {f"p{level}": 2**level for level in levels}
        self._out_feature_channels = dict.fromkeys(self._out_features, out_channels)

    @property
    def size_divisibility(self) -> int:
        """What H and W must be multiples of, in pixels: the coarsest stride of the levels."""
        return self._size_divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        """What batches are padded to: multiples of a size and, where positive, a square."""
        return {"size_divisibility": self._size_divisibility, "square_size": self._square_pad}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the levels of an image batch.

        Args:
            x: float (N, C, H, W), H and W multiples of `size_divisibility`.

        Returns:
            `p2`, `p3`, ..., fine to coarse, each (N, out_channels, H / stride, W / stride).
        """
        below = self.net(x)
        levels = {
            f"p{stage}": getattr(self, f"simfp_{stage}")(below[self.in_feature])
            for stage in self._stages
        }
        if self.top_block is not None:
            source = str(self.top_block.in_feature)
            coarser = self.top_block(below[source] if source in below else levels[source])
            levels.update(zip(self._out_features[len(levels) :], coarser, strict=True))
        return levels


def _conv(in_channels: int, out_channels: int, kernel: int, norm: Any) -> Conv2d:
    return Conv2d(
        in_channels,
        out_channels,
        kernel,
        padding=kernel // 2,
        bias=norm == "",
        norm=get_norm(norm, out_channels),
    )
