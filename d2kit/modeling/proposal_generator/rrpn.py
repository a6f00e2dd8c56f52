"""Rotated region proposal network.

Source: Ma et al., Arbitrary-Oriented Scene Text Detection via Rotation Proposals (2018), section
III.
"""

from typing import Any

from d2kit.config import CfgNode, configurable
from d2kit.layers import ShapeSpec
from d2kit.modeling.box_regression import Box2BoxTransformRotated
from d2kit.modeling.proposal_generator.build import PROPOSAL_GENERATOR_REGISTRY
from d2kit.modeling.proposal_generator.proposal_utils import find_top_rpn_proposals
from d2kit.modeling.proposal_generator.rpn import RPN

__all__ = ["RRPN", "find_top_rrpn_proposals"]


find_top_rrpn_proposals = find_top_rpn_proposals
"""The same rules: boxes of five numbers are clipped, measured and suppressed as rotated ones."""


@PROPOSAL_GENERATOR_REGISTRY.register()
class RRPN(RPN):
    """An `RPN` with rotated anchors (`RotatedAnchorGenerator`) and rotated ground truth.

    Args:
        **kwargs: as of `RPN`; `box2box_transform` is a `Box2BoxTransformRotated`.

    Raises:
        ValueError: upright anchors, or a loss that has no rotated form.

    Source: Ma et al. (2018), section III.
    """

    @configurable
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if getattr(self.anchor_generator, "box_dim", 5) != 5:
            raise ValueError(
                "RRPN needs rotated anchors: set MODEL.ANCHOR_GENERATOR.NAME to "
                f"RotatedAnchorGenerator, got {type(self.anchor_generator).__name__}"
            )
        check_rotated_loss(self.box_reg_loss_type, "MODEL.RPN")

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Return the constructor's arguments for `cfg` and the backbone's output shapes."""
        weights = rotated_weights(cfg.MODEL.RPN.BBOX_REG_WEIGHTS, "MODEL.RPN")
        return {
            **super().from_config(cfg, input_shape),
            "box2box_transform": Box2BoxTransformRotated(weights=weights),
        }


def rotated_weights(weights: Any, section: str) -> tuple[float, float, float, float, float]:
    """Return the five weights of rotated box deltas.

    Args:
        weights: as the config has them.
        section: of the config, for the message.

    Raises:
        ValueError: if they are not five.
    """
    if len(weights) != 5:
        raise ValueError(
            f"{section}.BBOX_REG_WEIGHTS: rotated boxes need five weights (dx, dy, dw, dh, "
            f"da), for example (10.0, 10.0, 5.0, 5.0, 1.0), got {tuple(weights)}"
        )
    dx, dy, dw, dh, da = weights
    return dx, dy, dw, dh, da


def check_rotated_loss(box_reg_loss_type: str, section: str) -> None:
    """Raise ValueError unless the box loss has a rotated form.

    Args:
        box_reg_loss_type: as the config has it.
        section: of the config, for the message.
    """
    if box_reg_loss_type != "smooth_l1":
        raise ValueError(
            f"{section}.BBOX_REG_LOSS_TYPE must be smooth_l1 for rotated boxes, got "
            f"{box_reg_loss_type!r}"
        )
