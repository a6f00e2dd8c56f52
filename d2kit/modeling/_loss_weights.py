"""Factors of the losses of a module that has several."""

from collections.abc import Mapping

from torch import Tensor


def weights_per_loss(
    weight: float | Mapping[str, float], names: tuple[str, ...]
) -> dict[str, float]:
    """Return the factor of each loss.

    Args:
        weight: one for all, or one per name.
        names: the losses.
    """
    return dict(weight) if isinstance(weight, Mapping) else dict.fromkeys(names, weight)


def weighted(weights: Mapping[str, float], **losses: Tensor) -> dict[str, Tensor]:
    """Return `losses` times their factors; one without a factor stays as it is."""
    return {name: loss * weights.get(name, 1.0) for name, loss in losses.items()}
