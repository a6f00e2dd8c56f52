"""The training loop: `TrainerBase` iterates, hooks do the rest, `SimpleTrainer` does one step."""

from d2kit.engine.trainer_base import HookBase, TrainerBase
from d2kit.engine.trainers import AMPTrainer, SimpleTrainer

__all__ = ["AMPTrainer", "HookBase", "SimpleTrainer", "TrainerBase"]
