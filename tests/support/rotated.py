"""A rotated detector of a few thousand weights, and images of bright turned rectangles."""

import math

import numpy as np
import torch

from d2kit.structures import Instances, RotatedBoxes
from tests.support.tiny_model import tiny_config

CLASSES = 2


def rotated_config(*options):
    cfg = tiny_config()
    cfg.MODEL.MASK_ON = False
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "RRPN"
    cfg.MODEL.ANCHOR_GENERATOR.NAME = "RotatedAnchorGenerator"
    cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [[0.5, 1.0]]
    cfg.MODEL.ANCHOR_GENERATOR.ANGLES = [[-60, -30, 0, 30, 60, 90]]
    cfg.MODEL.RPN.BBOX_REG_WEIGHTS = (1.0, 1.0, 1.0, 1.0, 1.0)
    cfg.MODEL.ROI_HEADS.NAME = "RROIHeads"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = CLASSES
    cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE = "ROIAlignRotated"
    cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS = (10.0, 10.0, 5.0, 5.0, 1.0)
    cfg.merge_from_list(list(options))
    return cfg


def paint(image: np.ndarray, box, value) -> None:
    """Set the pixels of `image` (H, W, 3) whose centres lie in the rotated box."""
    cx, cy, w, h, angle = box
    y, x = np.mgrid[: image.shape[0], : image.shape[1]] + 0.5
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    along = (x - cx) * cos - (y - cy) * sin
    across = (x - cx) * sin + (y - cy) * cos
    image[(abs(along) <= w / 2) & (abs(across) <= h / 2)] = value


def rotated_scene(seed: int, objects: int = 1, size=(64, 80)):
    """Image (H, W, 3) uint8, boxes (R, 5) and classes (R,)."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 60, (*size, 3)).astype(np.uint8)
    boxes = np.stack(
        [
            rng.uniform(24, size[1] - 24, objects),
            rng.uniform(24, size[0] - 24, objects),
            rng.uniform(24, 32, objects),
            rng.uniform(10, 16, objects),
            rng.uniform(-90, 90, objects),
        ],
        axis=1,
    )
    classes = rng.integers(0, CLASSES, objects)
    for box, c in zip(boxes, classes, strict=True):
        paint(image, box, (230, 60, 60) if c == 0 else (60, 230, 230))
    return image, boxes, classes


def rotated_input(seed: int, objects: int = 1) -> dict:
    """One image, as the mapper gives it."""
    image, boxes, classes = rotated_scene(seed, objects)
    instances = Instances(image.shape[:2])
    instances.gt_boxes = RotatedBoxes(torch.as_tensor(boxes.reshape(-1, 5)))
    instances.gt_classes = torch.as_tensor(classes, dtype=torch.int64)
    return {
        "image": torch.from_numpy(image.transpose(2, 0, 1).copy()),
        "height": image.shape[0],
        "width": image.shape[1],
        "instances": instances,
        "sample_seed": 1000 + seed,
        "image_id": seed,
    }
