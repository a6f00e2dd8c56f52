"""Training statistics of the model, published to the event storage where one is active."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from d2kit.utils.events import get_event_storage, has_event_storage


def put_scalars(prefix: str, **values: Tensor | float) -> None:
    """Publish `values` as ``prefix/name``, without waiting for the device.

    Args:
        prefix: the first part of each name, for example ``"rpn"``; empty for none.
        **values: numbers or 0-dim tensors; tensors stay where they are until they are written.
    """
    if not has_event_storage():
        return
    storage = get_event_storage()
    for name, value in values.items():
        storage.put_scalar(f"{prefix}/{name}" if prefix else name, value)


def picture_due(period: int) -> bool:
    """Tell whether this step publishes pictures: every `period` steps, 0 for never."""
    return period > 0 and has_event_storage() and get_event_storage().iter % period == 0


def put_image(name: str, image: Tensor) -> None:
    """Publish an RGB `image` (3, H, W), uint8 or float in 0..1, under `name`."""
    if has_event_storage():
        get_event_storage().put_image(name, image)


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
