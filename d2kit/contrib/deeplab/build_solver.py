"""The polynomial learning-rate schedule."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from d2kit import solver
from d2kit.config import CfgNode
from d2kit.solver.lr_scheduler import WarmupLR


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
        return left if step < self.warmup_iters else max(left, self.constant_ending)


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
