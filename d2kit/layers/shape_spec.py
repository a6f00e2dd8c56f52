"""Shape of a feature map as far as it is known when a model is built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from d2kit.utils.registry import nearest_names

__all__ = ["ShapeSpec"]


@dataclass
class ShapeSpec:
    """What one module tells the next about its output.

    Args:
        channels: C; None where unknown.
        height: H in pixels; None where it depends on the image.
        width: W in pixels; None where it depends on the image.
        stride: pixels of the input image per pixel of the feature map.
    """

    channels: int | None = None
    height: int | None = None
    width: int | None = None
    stride: int | None = None


def shapes_of(names: Sequence[str], shapes: Mapping[str, ShapeSpec], key: str) -> list[ShapeSpec]:
    """Return the shapes of some of the backbone's levels.

    Args:
        names: of the levels.
        shapes: feature name -> its shape, as the backbone gives it.
        key: the config key that holds `names`, for the message.

    Raises:
        ValueError: if there is no such level.
    """
    unknown = [name for name in names if name not in shapes]
    if unknown:
        raise ValueError(
            f"{key} names {unknown}, which the backbone does not give; it "
            f"gives {sorted(shapes)} (nearest: {nearest_names(unknown[0], shapes)})"
        )
    return [shapes[name] for name in names]


def region_shape(shape: ShapeSpec, what: str) -> tuple[int, int, int]:
    """Return channels, height and width of one region's features; the sides default to 1.

    Args:
        shape: what a pooler or a head states.
        what: who asks, for the message.

    Raises:
        ValueError: if the channels are not known.
    """
    if shape.channels is None:
        raise ValueError(f"{what} needs the channels of its input, got {shape}")
    return shape.channels, shape.height or 1, shape.width or 1
