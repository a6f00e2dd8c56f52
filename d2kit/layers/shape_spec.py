"""Shape of a feature map as far as it is known when a model is built."""

from dataclasses import dataclass

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
