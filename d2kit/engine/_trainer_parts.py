"""Parts of `DefaultTrainer` that a config decides."""

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from d2kit.config import CfgNode
from d2kit.engine._trainers import AMPTrainer, SimpleTrainer, amp_precision

__all__ = ["build_inner_trainer"]


def build_inner_trainer(
    cfg: CfgNode, model: nn.Module, data_loader: Iterable[Any], optimizer: Optimizer
) -> SimpleTrainer:
    """Return what does one iteration: with mixed precision or not, of a batch in parts or whole."""
    steps = cfg.SOLVER.ACCUMULATE_STEPS
    if not cfg.SOLVER.AMP.ENABLED:
        return SimpleTrainer(model, data_loader, optimizer, accumulate_steps=steps)
    precision = amp_precision(cfg.SOLVER.AMP.PRECISION)
    return AMPTrainer(model, data_loader, optimizer, precision=precision, accumulate_steps=steps)
