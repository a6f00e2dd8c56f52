"""Small images and detections to draw."""

import numpy as np
import torch

from d2kit.structures import Boxes, Instances

GREY = 100
META = {
    "thing_classes": ["patient", "nurse"],
    "thing_colors": [(200, 0, 0), (0, 200, 0)],
    "stuff_classes": ["floor", "wall"],
    "stuff_colors": [(0, 0, 200), (200, 200, 0)],
}


def image(height=60, width=80, value=GREY):
    return np.full((height, width, 3), value, dtype=np.uint8)


def disc(height=60, width=80, center=(30, 40), radius=12):
    y, x = np.mgrid[:height, :width]
    return (y - center[0]) ** 2 + (x - center[1]) ** 2 <= radius**2


def detections(count=2, masks=True):
    boxes = torch.tensor([[10.0, 15, 40, 45], [45, 20, 75, 55], [0, 0, 20, 20]])[:count]
    instances = Instances(
        (60, 80),
        pred_boxes=Boxes(boxes),
        scores=torch.linspace(0.5, 0.9, count),
        pred_classes=torch.arange(count) % 2,
    )
    if masks:
        stack = np.zeros((count, 60, 80), dtype=bool)
        for mask, (x0, y0, x1, y1) in zip(stack, boxes.int().tolist(), strict=True):
            mask[y0:y1, x0:x1] = True
        instances.pred_masks = torch.from_numpy(stack)
    return instances


def changed(output, reference=None):
    reference = image(*output.shape[:2]) if reference is None else reference
    return (output != reference).any(axis=2)
