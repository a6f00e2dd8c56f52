"""Registry of proposal generators."""

from typing import Any

from d2kit.config import CfgNode
from d2kit.layers import ShapeSpec
from d2kit.utils.registry import Registry

__all__ = ["PROPOSAL_GENERATOR_REGISTRY", "build_proposal_generator"]

PROPOSAL_GENERATOR_REGISTRY = Registry("PROPOSAL_GENERATOR")
"""Proposal generators: called with ``(cfg, input_shape)``, they return an ``nn.Module``."""


def build_proposal_generator(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> Any:
    """Build the proposal generator that ``cfg.MODEL.PROPOSAL_GENERATOR.NAME`` names.

    Args:
        cfg: the config.
        input_shape: feature name -> its shape, as the backbone gives it.

    Returns:
        The module, or None for ``"PrecomputedProposals"``, where the data brings the proposals.
    """
    name = cfg.MODEL.PROPOSAL_GENERATOR.NAME
    if name == "PrecomputedProposals":
        return None
    return PROPOSAL_GENERATOR_REGISTRY.get(name)(cfg, input_shape)
