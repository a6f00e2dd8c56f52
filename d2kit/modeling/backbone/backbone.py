"""The interface of every backbone."""

from abc import ABCMeta, abstractmethod
from typing import Any

from torch import nn

from d2kit.layers import ShapeSpec

__all__ = ["Backbone"]


class Backbone(nn.Module, metaclass=ABCMeta):
    """A network from an image batch to named feature maps.

    A subclass implements `forward` and either overrides `output_shape` or sets
    `_out_features` (list of names), `_out_feature_channels` and `_out_feature_strides`
    (name to channels, and to the stride in input pixels).
    """

    _out_features: list[str]
    _out_feature_channels: dict[str, int]
    _out_feature_strides: dict[str, int]

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the features of an image batch.

        Args:
            *args: usually one float tensor (N, C, H, W).
            **kwargs: none in the backbones of this package.

        Returns:
            Feature name to tensor (N, C_f, H / stride, W / stride).
        """

    @property
    def size_divisibility(self) -> int:
        """What H and W must be multiples of, in pixels; 0 where any size is accepted."""
        return 0

    @property
    def padding_constraints(self) -> dict[str, int]:
        """Further demands on the padding of a batch.

        Returns:
            May hold `size_divisibility` (as the property) and `square_size`: where positive, the
            batch is padded to a square of that side, in pixels.
        """
        return {}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return channels and stride of every output feature, by name."""
        return {
            name: ShapeSpec(
                channels=self._out_feature_channels[name],
                stride=self._out_feature_strides[name],
            )
            for name in self._out_features
        }
