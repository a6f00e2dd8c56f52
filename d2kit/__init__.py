"""d2kit: Detectron2's workflow after one ``pip install``.

Importing this package is cheap: nothing but the version is loaded until a subpackage is used, or
one of the shortcuts ``d2kit.Predictor``, ``d2kit.init_detector``, ``d2kit.inference_detector``,
``d2kit.show_result``, ``d2kit.train``.
"""

import importlib
from typing import Any

__version__ = "0.2.0"

SHORTCUTS = {
    "Predictor": "d2kit.predict",
    "inference_detector": "d2kit.predict",
    "init_detector": "d2kit.predict",
    "register_dataset": "d2kit.data.datasets",
    "show_result": "d2kit.predict",
    "train": "d2kit.cli.train",
}
"""Name in this package -> the module that has it."""


def __getattr__(name: str) -> Any:
    """Load a shortcut when it is first used."""
    if name not in SHORTCUTS:
        raise AttributeError(f"module 'd2kit' has no attribute '{name}'")
    return getattr(importlib.import_module(SHORTCUTS[name]), name)


def __dir__() -> list[str]:
    """List the shortcuts too."""
    return sorted([*globals(), *SHORTCUTS])
