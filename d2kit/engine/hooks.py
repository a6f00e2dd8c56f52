"""Hooks: what happens around the iterations of a training."""

from d2kit.engine._hooks_average import WeightAveraging
from d2kit.engine._hooks_checkpoint import BestCheckpointer, PeriodicCheckpointer
from d2kit.engine._hooks_eval import EvalHook, PreciseBN
from d2kit.engine._hooks_preemption import Preemption
from d2kit.engine._hooks_profile import AutogradProfiler, TorchMemoryStats, TorchProfiler
from d2kit.engine._hooks_progress import CallbackHook, IterationTimer, LRScheduler, PeriodicWriter
from d2kit.engine._hooks_stopping import EarlyStopping
from d2kit.engine._trainer_base import HookBase

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
