"""Config keys of DeepLab, which `get_cfg` does not hold, and its polynomial schedule."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from d2kit import solver
from d2kit.config import CfgNode
from d2kit.config.cfg_node import add_keys
from d2kit.solver.build import WarmupLR

__all__ = [
    "add_deeplab_config",
]


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


class WarmupPolyLR(WarmupLR):
    """Multiplies the rate by ``(1 - step / max_iters) ** power`` and a warm-up factor.

    Args:
        optimizer: whose groups' ``lr`` is changed.
        max_iters: number of steps until 0.
        warmup_factor: factor at step 0.
        warmup_iters: number of warm-up steps.
        warmup_method: "linear" or "constant".
        last_epoch: index of the step done last; -1 at the start.
        power: of the polynomial.
        constant_ending: least factor after the warm-up, in 0..1.

    Raises:
        ValueError: an unknown method, or a factor that is not in 0..1.

    Source: Chen et al., DeepLab (2017), the learning rate policy "poly".
    """

    def __init__(
        self,
        optimizer: Optimizer,
        max_iters: int,
        warmup_factor: float = 0.001,
        warmup_iters: int = 1000,
        warmup_method: str = "linear",
        last_epoch: int = -1,
        power: float = 0.9,
        constant_ending: float = 0.0,
    ) -> None:
        if not 0.0 <= constant_ending <= 1.0:
            raise ValueError(
                "SOLVER.POLY_LR_CONSTANT_ENDING is a factor of the rate: expected 0 to 1, got "
                f"{constant_ending}"
            )
        self.max_iters = max_iters
        self.power = power
        self.constant_ending = constant_ending
        super().__init__(optimizer, warmup_factor, warmup_iters, warmup_method, last_epoch)

    def _factor(self, step: int) -> float:
        left = max(0.0, 1.0 - step / self.max_iters) ** self.power
        return float(left if step < self.warmup_iters else max(left, self.constant_ending))


def build_lr_scheduler(cfg: CfgNode, optimizer: Optimizer) -> LRScheduler:
    """Build the schedule that ``SOLVER.LR_SCHEDULER_NAME`` names: WarmupPolyLR, or any other.

    Args:
        cfg: a full config with the keys of `add_deeplab_config`.
        optimizer: its groups' ``lr`` is changed by the schedule.

    Raises:
        ValueError: if the name is unknown.
    """
    node = cfg.SOLVER
    if node.LR_SCHEDULER_NAME != "WarmupPolyLR":
        return solver.build_lr_scheduler(cfg, optimizer)
    return WarmupPolyLR(
        optimizer,
        node.MAX_ITER,
        warmup_factor=node.WARMUP_FACTOR,
        warmup_iters=node.WARMUP_ITERS,
        warmup_method=node.WARMUP_METHOD,
        power=node.POLY_LR_POWER,
        constant_ending=node.POLY_LR_CONSTANT_ENDING,
    )
