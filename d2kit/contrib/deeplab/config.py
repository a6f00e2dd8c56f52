"""Config keys of DeepLab, which `get_cfg` does not hold."""

from typing import Any

from d2kit.config import CfgNode
from d2kit.config.cfg_node import add_keys

__all__ = ["add_deeplab_config"]

DEEPLAB_KEYS: dict[str, tuple[Any, str]] = {
    "SOLVER.POLY_LR_POWER": (0.9, "Power of WarmupPolyLR."),
    "SOLVER.POLY_LR_CONSTANT_ENDING": (0.0, "Least factor of WarmupPolyLR after the warm-up."),
    "MODEL.SEM_SEG_HEAD.LOSS_TYPE": ("hard_pixel_mining", "Or cross_entropy."),
    "MODEL.SEM_SEG_HEAD.PROJECT_FEATURES": (["res2"], "Not used: all of IN_FEATURES are."),
    "MODEL.SEM_SEG_HEAD.PROJECT_CHANNELS": (
        [48],
        "Channels each finer feature is reduced to.",
    ),
    "MODEL.SEM_SEG_HEAD.ASPP_CHANNELS": (256, "Channels of the pyramid pooling."),
    "MODEL.SEM_SEG_HEAD.ASPP_DILATIONS": ([6, 12, 18], "Its dilations, in pixels of the feature."),
    "MODEL.SEM_SEG_HEAD.ASPP_DROPOUT": (0.1, "Probability of zeroing one of its outputs."),
    "MODEL.SEM_SEG_HEAD.USE_DEPTHWISE_SEPARABLE_CONV": (False, "Depthwise separable convolutions."),
    "MODEL.RESNETS.RES4_DILATION": (1, "Dilation in res4: 1, or 2 with RES5_DILATION 4."),
    "MODEL.RESNETS.RES5_MULTI_GRID": ([1, 2, 4], "Factors of the dilation of res5's blocks."),
    "MODEL.RESNETS.STEM_TYPE": ("deeplab", "Three 3x3 convolutions; or basic, one 7x7."),
}
"""Full name -> (default, meaning)."""


def add_deeplab_config(cfg: CfgNode) -> None:
    """Add the keys of DeepLab to a config, in place; call it before files are merged.

    Args:
        cfg: not frozen.
    """
    add_keys(cfg, DEEPLAB_KEYS)
