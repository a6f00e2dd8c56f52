"""Hooks: what happens around the iterations of a training."""

from d2kit.engine.hooks.checkpoint import BestCheckpointer, PeriodicCheckpointer, WeightAveraging
from d2kit.engine.hooks.evaluation import EarlyStopping, EvalHook, PreciseBN
from d2kit.engine.hooks.progress import (
    AutogradProfiler,
    CallbackHook,
    IterationTimer,
    LRScheduler,
    PeriodicWriter,
    TorchMemoryStats,
    TorchProfiler,
)
from d2kit.engine.safety.stopping import Preemption
from d2kit.engine.trainer_base import HookBase

__all__ = [
    "AutogradProfiler",
    "BestCheckpointer",
    "CallbackHook",
    "EarlyStopping",
    "EvalHook",
    "HookBase",
    "IterationTimer",
    "LRScheduler",
    "PeriodicCheckpointer",
    "PeriodicWriter",
    "PreciseBN",
    "Preemption",
    "TorchMemoryStats",
    "TorchProfiler",
    "WeightAveraging",
]
