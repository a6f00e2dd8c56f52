"""Resizing as the detectors of torchvision do it: without antialiasing, sides rounded down."""

import numpy as np

from d2kit.data.transforms._geometric import ResizeShortestEdge
from d2kit.data.transforms.transform import NoOpTransform, ResizeTransform, Transform


class FloatResizeTransform(ResizeTransform):
    """Resizes images as float32, which is done bilinearly without antialiasing.

    Args:
        h: see `ResizeTransform`, as the others.
        w: see there.
        new_h: see there.
        new_w: see there.
        interp: see there.
    """

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        """Resize an image of shape (H, W) or (H, W, C); the result is float32."""
        return super().apply_image(np.asarray(img, dtype=np.float32), interp)


class TorchvisionResize(ResizeShortestEdge):
    """`ResizeShortestEdge` whose pixels and sides are those of torchvision's detectors.

    Args:
        short_edge_length: see `ResizeShortestEdge`, as the others.
        max_size: see there.
        sample_style: see there.
        interp: see there.
    """

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draw a length for the shorter side."""
        drawn = super().get_transform(image)
        if isinstance(drawn, NoOpTransform):
            return drawn
        return FloatResizeTransform(drawn.h, drawn.w, drawn.new_h, drawn.new_w, self.interp)

    @staticmethod
    def get_output_shape(
        oldh: int, oldw: int, short_edge_length: int, max_size: int
    ) -> tuple[int, int]:
        """See `ResizeShortestEdge.get_output_shape`; both sides are rounded down."""
        scale = min(short_edge_length / min(oldh, oldw), max_size / max(oldh, oldw))
        return max(int(oldh * scale), 1), max(int(oldw * scale), 1)
