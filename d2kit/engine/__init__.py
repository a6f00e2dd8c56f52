"""Training: the loop, its hooks, processes, and defaults that put them together."""

from typing import TYPE_CHECKING, Any

from d2kit.utils.env import paused_gc

if TYPE_CHECKING:
    from d2kit.predict import DefaultPredictor

with paused_gc():
    from d2kit.engine import hooks
    from d2kit.engine.default_trainer import DefaultTrainer
    from d2kit.engine.evaluate import check_evaluated_weights
    from d2kit.engine.hooks import (
        AutogradProfiler,
        BestCheckpointer,
        CallbackHook,
        EarlyStopping,
        EvalHook,
        IterationTimer,
        LRScheduler,
        PeriodicCheckpointer,
        PeriodicWriter,
        PreciseBN,
        TorchMemoryStats,
        TorchProfiler,
        WeightAveraging,
    )
    from d2kit.engine.launch import DEFAULT_TIMEOUT, launch
    from d2kit.engine.setup import (
        _highlight,  # imported from d2kit.engine.defaults by user code
        _try_get_key,
        create_ddp_model,
        default_argument_parser,
        default_setup,
        default_writers,
        user_errors,
    )
    from d2kit.engine.trainer_base import HookBase, TrainerBase
    from d2kit.engine.trainers import AMPTrainer, SimpleTrainer

__all__ = [
    "DEFAULT_TIMEOUT",
    "AMPTrainer",
    "AutogradProfiler",
    "BestCheckpointer",
    "CallbackHook",
    "DefaultPredictor",
    "DefaultTrainer",
    "EarlyStopping",
    "EvalHook",
    "HookBase",
    "IterationTimer",
    "LRScheduler",
    "PeriodicCheckpointer",
    "PeriodicWriter",
    "PreciseBN",
    "SimpleTrainer",
    "TorchMemoryStats",
    "TorchProfiler",
    "TrainerBase",
    "WeightAveraging",
    "check_evaluated_weights",
    "create_ddp_model",
    "default_argument_parser",
    "default_setup",
    "default_writers",
    "launch",
    "user_errors",
]


def __getattr__(name: str) -> Any:
    """Load the predictor, and the models with it, when it is first used."""
    if name != "DefaultPredictor":
        raise AttributeError(f"module 'd2kit.engine' has no attribute '{name}'")
    from d2kit.predict import DefaultPredictor

    return DefaultPredictor
