"""The interface of every backbone, their registry, and the way from config to backbone."""

from __future__ import annotations

from abc import ABCMeta, abstractmethod
from typing import Any

from torch import nn

from d2kit.config import CfgNode
from d2kit.layers import ShapeSpec
from d2kit.utils.registry import Registry

__all__ = [
    "BACKBONE_REGISTRY",
    "Backbone",
    "build_backbone",
]


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


BACKBONE_REGISTRY = Registry("BACKBONE")
BACKBONE_REGISTRY.__doc__ = """Functions or classes `(cfg, input_shape: ShapeSpec) -> Backbone`."""


def build_backbone(cfg: CfgNode, input_shape: ShapeSpec | None = None) -> Backbone:
    """Build the backbone that `cfg.MODEL.BACKBONE.NAME` names.

    Args:
        cfg: a full config.
        input_shape: shape of the input; by default as many channels as `cfg.MODEL.PIXEL_MEAN` has.

    Returns:
        The backbone, freshly initialised.

    Raises:
        KeyError: no backbone of that name is registered.
        TypeError: what is registered under it does not return a `Backbone`.
    """
    if input_shape is None:
        input_shape = ShapeSpec(channels=len(cfg.MODEL.PIXEL_MEAN))
    name = cfg.MODEL.BACKBONE.NAME
    backbone = BACKBONE_REGISTRY.get(name)(cfg, input_shape)
    if not isinstance(backbone, Backbone):
        raise TypeError(
            f"MODEL.BACKBONE.NAME {name!r} must build a d2kit.modeling.Backbone, but it returned "
            f"a {type(backbone).__name__}; derive the class from Backbone."
        )
    return backbone
