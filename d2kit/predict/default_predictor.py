"""`DefaultPredictor`: from a config to detections in one image."""

from typing import Any

import numpy as np
import torch

from d2kit.checkpoint import DetectionCheckpointer
from d2kit.config import CfgNode
from d2kit.engine.resolve import build_metadata

__all__ = ["DefaultPredictor"]


class DefaultPredictor:
    """Runs the model of a config on single images.

    Loads MODEL.WEIGHTS, takes BGR images whatever INPUT.FORMAT is, and resizes by
    INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST. For many images, or several at a time, use the model.

    Args:
        cfg: the config; copied.

    Raises:
        ValueError: if INPUT.FORMAT is neither BGR nor RGB.
        FileNotFoundError: if the weights cannot be found.

    Example:
        >>> predictor = DefaultPredictor(cfg)  # doctest: +SKIP
        >>> instances = predictor(cv2.imread("image.jpg"))["instances"]  # doctest: +SKIP
    """

    def __init__(self, cfg: CfgNode) -> None:
        from d2kit.data.detection_utils import build_augmentation
        from d2kit.modeling import build_model

        self.cfg = cfg.clone()
        self.input_format = cfg.INPUT.FORMAT
        if self.input_format not in ("RGB", "BGR"):
            raise ValueError(
                f"DefaultPredictor: INPUT.FORMAT must be BGR or RGB, got '{self.input_format}'"
            )
        self.model = build_model(self.cfg)
        self.model.eval()
        known = len(cfg.DATASETS.TEST) + len(cfg.MODEL.CLASS_NAMES)
        self.metadata = build_metadata(cfg) if known else None
        DetectionCheckpointer(self.model).load(cfg.MODEL.WEIGHTS)
        self.aug = build_augmentation(cfg, is_train=False)[0]

    def __call__(self, original_image: np.ndarray) -> dict[str, Any]:
        """Detect in one image.

        Args:
            original_image: (H, W, 3) uint8, BGR, as OpenCV reads it.

        Returns:
            What the model returns for the image, e.g. ``{"instances": Instances}`` with boxes in
            pixels of `original_image`.

        Raises:
            ValueError: if the array has another shape.
        """
        image = np.asarray(original_image)
        if image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(
                f"DefaultPredictor: expected an array (H, W, 3) in BGR, got shape {image.shape}"
            )
        height, width = image.shape[:2]
        if self.input_format == "RGB":
            image = image[:, :, ::-1]
        resized = self.aug.get_transform(image).apply_image(image)
        tensor = torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1), np.float32))
        with torch.no_grad():
            return self.model([{"image": tensor, "height": height, "width": width}])[0]
