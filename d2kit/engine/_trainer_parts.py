"""Parts of `DefaultTrainer` that a config decides."""

import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fvcore.common.checkpoint import Checkpointer
from torch import nn
from torch.optim import Optimizer

from d2kit.config import CfgNode
from d2kit.engine._hooks_average import WeightAveraging
from d2kit.engine._hooks_checkpoint import BestCheckpointer
from d2kit.engine._hooks_epochs import EpochLoss
from d2kit.engine._hooks_eval import EvalHook, PreciseBN
from d2kit.engine._hooks_stopping import EarlyStopping
from d2kit.engine._trainer_base import HookBase, TrainerBase
from d2kit.engine._trainers import AMPTrainer, SimpleTrainer, amp_precision
from d2kit.utils import comm

__all__ = [
    "build_averaging_hook",
    "build_epochs_hook",
    "build_evaluation_hooks",
    "build_full_results",
    "build_inner_trainer",
    "build_precise_bn",
    "evaluated_weights",
    "repeat_missed_evaluation",
]

logger = logging.getLogger(__name__)


def build_averaging_hook(
    cfg: CfgNode, model: nn.Module, checkpointer: Checkpointer
) -> WeightAveraging | None:
    """Return the hook of SOLVER.EMA; None where that is off."""
    ema = cfg.SOLVER.EMA
    if not ema.ENABLED:
        return None
    return WeightAveraging(model, ema.DECAY, warmup=ema.WARMUP, checkpointer=checkpointer)


def build_epochs_hook(cfg: CfgNode, images: int | None) -> EpochLoss | None:
    """Return the hook that tells the loss of each epoch; None on other processes than rank 0.

    Args:
        cfg: a full config; without a key in epochs there is no such hook.
        images: in one pass over the training set.
    """
    in_epochs = cfg.SOLVER.MAX_EPOCHS or cfg.TEST.EVAL_EPOCHS
    if not (in_epochs and images and comm.is_main_process()):
        return None
    return EpochLoss(images / cfg.SOLVER.IMS_PER_BATCH)


def build_inner_trainer(
    cfg: CfgNode, model: nn.Module, data_loader: Iterable[Any], optimizer: Optimizer
) -> SimpleTrainer:
    """Return what does one iteration: with mixed precision or not, of a batch in parts or whole."""
    steps = cfg.SOLVER.ACCUMULATE_STEPS
    if not cfg.SOLVER.AMP.ENABLED:
        return SimpleTrainer(model, data_loader, optimizer, accumulate_steps=steps)
    precision = amp_precision(cfg.SOLVER.AMP.PRECISION)
    return AMPTrainer(model, data_loader, optimizer, precision=precision, accumulate_steps=steps)


def better_mode(metric: str) -> str:
    """Return "min" for a loss and "max" for any other metric."""
    return "min" if "loss" in metric.lower() else "max"


def build_evaluation_hooks(
    cfg: CfgNode,
    evaluate: Callable[[], Mapping[str, Any] | None],
    checkpointer: Checkpointer,
    others: Iterable[HookBase | None],
) -> list[HookBase | None]:
    """Return the hooks that evaluate, end the training early, and keep the best checkpoint.

    Args:
        cfg: a full config.
        evaluate: what `EvalHook` calls.
        checkpointer: saves the best checkpoint, on rank 0.
        others: the hooks before them.
    """
    period, best, stop = cfg.TEST.EVAL_PERIOD, cfg.TEST.BEST_METRIC, cfg.SOLVER.EARLY_STOPPING
    found: list[HookBase | None] = [
        EvalHook(period, evaluate, remember=bool(best or stop.PATIENCE))
    ]
    if stop.PATIENCE:
        mode = better_mode(stop.METRIC)
        hook = EarlyStopping(
            period, stop.METRIC, stop.PATIENCE, mode=mode, min_delta=stop.MIN_DELTA
        )
        found.append(hook)
    if best and comm.is_main_process():
        averaging = next((hook for hook in others if isinstance(hook, WeightAveraging)), None)
        mode = better_mode(best)
        found.append(BestCheckpointer(period, checkpointer, best, mode, averaging=averaging))
    return found


def build_full_results(cfg: CfgNode, model: nn.Module, results: dict[str, Any]) -> dict[str, Any]:
    """Return the results of an evaluation, with TEST.VALIDATION_LOSS also the losses.

    Args:
        cfg: a full config.
        model: with the weights that were evaluated.
        results: as of `DefaultTrainer.test`; the losses are added as task ``validation``.
    """
    if not cfg.TEST.VALIDATION_LOSS:
        return results
    from d2kit.evaluation.validation_loss import build_validation_loader, validation_losses

    names = cfg.DATASETS.TEST
    for name in names:
        losses = validation_losses(model, build_validation_loader(cfg, name))
        if comm.is_main_process():
            values = ", ".join(f"{key} {value:.5g}" for key, value in losses.items())
            logger.info("Losses on %s: %s", name, values)
            place = results if len(names) == 1 else results.setdefault(name, {})
            place["validation"] = losses
    return results


def repeat_missed_evaluation(trainer: TrainerBase) -> None:
    """Evaluate as after the iteration before the first, if the checkpoint does not know of it.

    A checkpoint is saved before the evaluation of its iteration, so that it is safe whatever
    happens there; a run resumed from it would otherwise lack one metric to choose and stop by.
    """
    kinds = (EvalHook, EarlyStopping, BestCheckpointer)
    chosen = [hook for hook in trainer._hooks if isinstance(hook, kinds)]
    start = trainer.start_iter
    if start >= trainer.max_iter or not any(
        isinstance(hook, EvalHook) and hook.missed(start) for hook in chosen
    ):
        return
    trainer.iter = trainer.storage.iter = start - 1
    for hook in chosen:
        hook.after_step()
    trainer.iter = trainer.storage.iter = start


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
