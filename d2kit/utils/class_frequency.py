"""How often the classes of a dataset occur, for models, which know nothing of datasets.

Models and datasets may not import each other, but the federated loss needs the frequencies of the
training set. `d2kit.data` provides the function as it is imported, and a predictor asks here.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

__all__ = ["class_weights", "provides_class_weights"]

_Provider = TypeVar("_Provider", bound=Callable[..., Any])
_PROVIDERS: list[Callable[..., Any]] = []


def provides_class_weights(function: _Provider) -> _Provider:
    """Let `class_weights` call `function(dataset_names, power)`; the last one given is used."""
    _PROVIDERS.append(function)
    return function


def class_weights(dataset_names: Sequence[str], power: float) -> Any:
    """Return the number of training images of each class, raised to `power`.

    Args:
        dataset_names: registered datasets (DATASETS.TRAIN), whose metadata have
            `class_image_count`.
        power: exponent, for example 0.5.

    Returns:
        (K,) float32 tensor.

    Raises:
        LookupError: nothing provides the numbers, because `d2kit.data` was not imported.
    """
    if not _PROVIDERS:
        raise LookupError(
            f"the class frequencies of {list(dataset_names)} (MODEL.ROI_BOX_HEAD.USE_FED_LOSS) "
            "come from the datasets' metadata: `import d2kit.data` before the model is built"
        )
    return _PROVIDERS[-1](dataset_names, power)
