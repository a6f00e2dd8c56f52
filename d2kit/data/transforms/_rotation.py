"""Rotation about a point."""

import numpy as np
from fvcore.transforms.transform import NoOpTransform, Transform, TransformList

from d2kit.data.transforms._crop import CropTransform


class RotationTransform(Transform):
    """Rotate about a point, counter-clockwise as seen on the screen.

    Args:
        h: height of the image, pixels.
        w: width of the image.
        angle: degrees.
        expand: whether the result grows so that the whole image is seen.
        center: (x, y) of the fixed point in pixels; the image's centre by default. With `expand`
            it has no influence: the result is centred anyway.
        interp: OpenCV's interpolation flag for images; None means linear. Segmentations use
            nearest.
    """

    def __init__(
        self,
        h: int,
        w: int,
        angle: float,
        expand: bool = True,
        center: tuple[float, float] | None = None,
        interp: int | None = None,
    ) -> None:
        super().__init__()
        self.h, self.w, self.angle, self.expand, self.interp = h, w, angle, expand, interp
        self.image_center = np.array((w / 2, h / 2))
        self.center = (w / 2, h / 2) if center is None else center
        self.bound_w, self.bound_h = w, h
        if expand:
            cos, sin = np.abs((np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))))
            bounds = np.rint((w * cos + h * sin, w * sin + h * cos))
            self.bound_w, self.bound_h = (int(side) for side in bounds)
        self.rm_coords = self.create_rotation_matrix()
        # OpenCV counts from the middle of the first pixel, coordinates from its corner
        self.rm_image = self.create_rotation_matrix(offset=-0.5)

    def create_rotation_matrix(self, offset: float = 0) -> np.ndarray:
        """Return the (2, 3) matrix from source to result points (x, y, 1).

        Args:
            offset: added to both systems' origin; -0.5 for pixel indices, 0 for coordinates.
        """
        theta = np.deg2rad(self.angle)
        linear = np.array([[np.cos(theta), np.sin(theta)], [-np.sin(theta), np.cos(theta)]])
        center = np.asarray(self.center, dtype=np.float64) + offset
        shift = center - linear @ center
        if self.expand:
            source_middle = self.image_center + offset
            result_middle = np.array((self.bound_w / 2, self.bound_h / 2)) + offset
            shift = result_middle - linear @ source_middle
        return np.concatenate([linear, shift[:, None]], axis=1)

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        """Rotate an image of shape (H, W) or (H, W, C); what comes from outside is 0."""
        if img.size == 0 or self.angle % 360 == 0:
            return img
        if img.shape[:2] != (self.h, self.w):
            raise ValueError(
                f"RotationTransform was made for {self.h}x{self.w} pixels (height x width), got an "
                f"array of shape {img.shape}"
            )
        import cv2

        if interp is None:
            interp = cv2.INTER_LINEAR if self.interp is None else self.interp
        source = img.view(np.uint8) if img.dtype == np.bool_ else img
        result = cv2.warpAffine(source, self.rm_image, (self.bound_w, self.bound_h), flags=interp)
        return result.reshape(*result.shape[:2], *img.shape[2:]).astype(img.dtype, copy=False)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Rotate (P, 2) points (x, y)."""
        points = np.asarray(coords, dtype=np.float64)
        if self.angle % 360 == 0 or points.size == 0:
            return points
        return points @ self.rm_coords[:, :2].T + self.rm_coords[:, 2]

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Rotate a label map or mask (H, W) by nearest neighbour."""
        import cv2

        return self.apply_image(segmentation, interp=cv2.INTER_NEAREST)

    def inverse(self) -> Transform:
        """Return the transform that rotates back and crops to the former size.

        Raises:
            NotImplementedError: without `expand`, because corners were lost.
        """
        if not self.expand:
            raise NotImplementedError("a rotation with expand=False cuts corners off: no inverse")
        if self.angle % 360 == 0:
            return NoOpTransform()
        back = RotationTransform(self.bound_h, self.bound_w, -self.angle, interp=self.interp)
        x0, y0 = (back.bound_w - self.w) // 2, (back.bound_h - self.h) // 2
        return TransformList([back, CropTransform(x0, y0, self.w, self.h)])
