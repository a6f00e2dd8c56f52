"""Reading of shapes that the config decides."""

from d2kit.layers import ShapeSpec


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
