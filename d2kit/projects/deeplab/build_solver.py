"""From config to learning-rate schedule, with that of DeepLab."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from d2kit import solver
from d2kit.config import CfgNode
from d2kit.projects.deeplab.lr_scheduler import WarmupPolyLR

__all__ = ["build_lr_scheduler"]


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
