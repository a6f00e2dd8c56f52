"""Parts of `DefaultTrainer` that a config decides."""

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

from fvcore.common.checkpoint import Checkpointer
from torch import nn
from torch.optim import Optimizer

from d2kit.config import CfgNode
from d2kit.engine._hooks_average import WeightAveraging
from d2kit.engine._hooks_eval import PreciseBN
from d2kit.engine._trainer_base import HookBase
from d2kit.engine._trainers import AMPTrainer, SimpleTrainer, amp_precision

__all__ = ["build_averaging_hook", "build_inner_trainer", "build_precise_bn", "evaluated_weights"]


def build_averaging_hook(
    cfg: CfgNode, model: nn.Module, checkpointer: Checkpointer
) -> WeightAveraging | None:
    """Return the hook of SOLVER.EMA; None where that is off."""
    ema = cfg.SOLVER.EMA
    if not ema.ENABLED:
        return None
    return WeightAveraging(model, ema.DECAY, warmup=ema.WARMUP, checkpointer=checkpointer)


def build_inner_trainer(
    cfg: CfgNode, model: nn.Module, data_loader: Iterable[Any], optimizer: Optimizer
) -> SimpleTrainer:
    """Return what does one iteration: with mixed precision or not, of a batch in parts or whole."""
    steps = cfg.SOLVER.ACCUMULATE_STEPS
    if not cfg.SOLVER.AMP.ENABLED:
        return SimpleTrainer(model, data_loader, optimizer, accumulate_steps=steps)
    precision = amp_precision(cfg.SOLVER.AMP.PRECISION)
    return AMPTrainer(model, data_loader, optimizer, precision=precision, accumulate_steps=steps)


def build_precise_bn(
    cfg: CfgNode, model: nn.Module, build_train_loader: Callable[[CfgNode], Iterable[Any]]
) -> PreciseBN:
    """Return the hook of TEST.PRECISE_BN, with a training loader of its own."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATALOADER.NUM_WORKERS = 0
    loader = build_train_loader(cfg)
    return PreciseBN(cfg.TEST.EVAL_PERIOD, model, loader, cfg.TEST.PRECISE_BN.NUM_ITER)


def evaluated_weights(hooks: Iterable[HookBase]) -> contextlib.AbstractContextManager[None]:
    """Return a context in which the model has the average of the weights, if a hook keeps one."""
    averaging = next((hook for hook in hooks if isinstance(hook, WeightAveraging)), None)
    return averaging.averaged() if averaging else contextlib.nullcontext()
