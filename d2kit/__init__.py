"""d2kit: Detectron2's workflow after one ``pip install``.

Importing this package is cheap: nothing but the version is loaded until a name is used.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "register_dataset"]


def __getattr__(name: str) -> Any:
    """Load the package's shortcuts when they are first used."""
    if name == "register_dataset":
        from d2kit.data.datasets import register_dataset

        return register_dataset
    raise AttributeError(f"module 'd2kit' has no attribute '{name}'")
