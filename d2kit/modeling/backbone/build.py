"""From config to backbone."""

from d2kit.config import CfgNode
from d2kit.layers import ShapeSpec
from d2kit.modeling.backbone.backbone import Backbone
from d2kit.utils.registry import Registry

__all__ = ["BACKBONE_REGISTRY", "build_backbone"]

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
