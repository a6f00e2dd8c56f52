"""Boxes at any angle."""

import math

import torch
from torch import Tensor

from d2kit.layers.rotated_boxes import pairwise_iou_rotated
from d2kit.structures.boxes import Boxes, BoxMode

__all__ = ["RotatedBoxes", "pairwise_iou"]

_RADIANS = math.pi / 180.0


def scaled_rotated(boxes: Tensor, scale_x: float, scale_y: float) -> Tensor:
    """Return boxes (R, 5) XYWHA in an image whose axes are scaled; see `RotatedBoxes.scale`."""
    angle = boxes[:, 4] * _RADIANS
    cos, sin = angle.cos(), angle.sin()
    # where the unit vectors along width and height go: (R, which of the two, x and y)
    axes = torch.stack([cos, -sin, sin, cos], dim=1).view(-1, 2, 2)
    factors = boxes.new_tensor([scale_x, scale_y])
    axes = axes * factors
    turned = torch.atan2(axes[:, 1, 0], axes[:, 1, 1]) / _RADIANS
    sizes = boxes[:, 2:4] * axes.norm(dim=2)
    return torch.cat([boxes[:, :2] * factors, sizes, turned[:, None]], dim=1)


class RotatedBoxes(Boxes):
    """R rotated boxes as one tensor.

    Args:
        tensor: (R, 5): centre x and y, width, height in absolute pixels, and the angle in degrees
            by which the box is turned counter-clockwise as seen in the image; becomes float32.

    Raises:
        ValueError: if the shape is not (R, 5).
    """

    _numbers = 5

    def area(self) -> Tensor:
        """Return the areas in square pixels, (R,) float32."""
        return self.tensor[:, 2] * self.tensor[:, 3]

    def normalize_angles(self) -> None:
        """Bring angles to [-180, 180) degrees, in place."""
        angles = (self.tensor[:, 4] + 180.0) % 360.0 - 180.0
        self.tensor = torch.cat([self.tensor[:, :4], angles[:, None]], dim=1)

    def clip(self, box_size: tuple[int, int], clip_angle_threshold: float = 1.0) -> None:
        """Limit nearly upright boxes to the image, in place; others stay as they are.

        Angles are normalised first. Clipping never makes a box larger.

        Args:
            box_size: (height, width) in pixels.
            clip_angle_threshold: boxes turned by at most this many degrees are clipped.
        """
        self.normalize_angles()
        limit = self.tensor.new_tensor([box_size[1], box_size[0]])
        centre, size, angle = self.tensor.split([2, 2, 1], dim=1)
        low = torch.minimum((centre - size / 2).clamp(min=0), limit)
        high = torch.minimum((centre + size / 2).clamp(min=0), limit)
        clipped = torch.cat([(low + high) / 2, torch.minimum(size, high - low), angle], dim=1)
        self.tensor = torch.where(angle.abs() <= clip_angle_threshold, clipped, self.tensor)

    def nonempty(self, threshold: float = 0.0) -> Tensor:
        """Tell which boxes have both sides longer than `threshold` pixels, (R,) bool."""
        return (self.tensor[:, 2:4] > threshold).all(dim=1)

    def inside_box(self, box_size: tuple[int, int], boundary_threshold: int = 0) -> Tensor:
        """Tell which boxes lie inside the reference box with all corners, (R,) bool.

        Args:
            box_size: (height, width) of the reference box, whose corner is at (0, 0).
            boundary_threshold: pixels by which a box may stick out.
        """
        bounds = BoxMode.convert(self.tensor, BoxMode.XYWHA_ABS, BoxMode.XYXY_ABS)
        assert isinstance(bounds, Tensor)
        return Boxes(bounds).inside_box(box_size, boundary_threshold)

    def get_centers(self) -> Tensor:
        """Return the centres, (R, 2) as x, y."""
        return self.tensor[:, :2]

    def scale(self, scale_x: float, scale_y: float) -> None:
        """Scale the image's axes, in place.

        A turned rectangle becomes a parallelogram under unequal factors; the result is the
        rectangle with the side lengths of that parallelogram and the direction of its height axis.
        """
        self.tensor.copy_(scaled_rotated(self.tensor, scale_x, scale_y))


def pairwise_iou(boxes1: RotatedBoxes, boxes2: RotatedBoxes) -> Tensor:
    """Return intersection over union of each of R1 and each of R2 rotated boxes, (R1, R2)."""
    return pairwise_iou_rotated(boxes1.tensor, boxes2.tensor)
