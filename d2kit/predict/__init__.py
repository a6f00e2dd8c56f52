"""Prediction: one predictor for pictures, tiles, batches and frames of videos."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from d2kit.predict.predictor import (
        DefaultPredictor,
        Predictor,
        find_images,
        inference_detector,
        init_detector,
    )
    from d2kit.predict.run import show_result

__all__ = [
    "DefaultPredictor",
    "Predictor",
    "find_images",
    "inference_detector",
    "init_detector",
    "show_result",
]


def __getattr__(name: str) -> Any:
    """Load a name when it is first used: `d2kit.engine` needs none to train."""
    if name not in __all__:
        raise AttributeError(f"module 'd2kit.predict' has no attribute '{name}'")
    place = "run" if name == "show_result" else "predictor"
    return getattr(importlib.import_module(f"d2kit.predict.{place}"), name)
