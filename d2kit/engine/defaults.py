"""What most trainings need: arguments, set-up, the default trainer and predictor."""

from typing import TYPE_CHECKING, Any

from d2kit.engine import hooks
from d2kit.engine.default_trainer import DefaultTrainer
from d2kit.engine.evaluate import check_evaluated_weights
from d2kit.engine.setup import (
    _highlight,  # noqa: F401 - imported from here by user code
    _try_get_key,  # noqa: F401
    create_ddp_model,
    default_argument_parser,
    default_setup,
    default_writers,
    user_errors,
)
from d2kit.engine.train_loop import AMPTrainer, SimpleTrainer, TrainerBase

if TYPE_CHECKING:
    from d2kit.predict import DefaultPredictor

__all__ = [
    "AMPTrainer",
    "DefaultPredictor",
    "DefaultTrainer",
    "SimpleTrainer",
    "TrainerBase",
    "check_evaluated_weights",
    "create_ddp_model",
    "default_argument_parser",
    "default_setup",
    "default_writers",
    "hooks",
    "user_errors",
]


def __getattr__(name: str) -> Any:
    """Load the predictor, and the models with it, when it is first used."""
    if name != "DefaultPredictor":
        raise AttributeError(f"module 'd2kit.engine.defaults' has no attribute '{name}'")
    from d2kit.predict import DefaultPredictor

    return DefaultPredictor
