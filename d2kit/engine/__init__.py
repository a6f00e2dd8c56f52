"""Training: the loop, its hooks, processes, and defaults that put them together."""

from d2kit.utils.env import paused_gc

with paused_gc():
    from d2kit.engine.defaults import (
        DefaultPredictor,
        DefaultTrainer,
        check_evaluated_weights,
        create_ddp_model,
        default_argument_parser,
        default_setup,
        default_writers,
        user_errors,
    )
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
    from d2kit.engine.train_loop import AMPTrainer, HookBase, SimpleTrainer, TrainerBase

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
