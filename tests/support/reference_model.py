"""Zoo models with the deterministic weights, images and ground truths of the reference vectors."""

import importlib.util
import json

import numpy as np
import torch

from d2kit.config import CfgNode, get_cfg
from d2kit.modeling import build_model
from d2kit.structures import Boxes, Instances, Keypoints, PolygonMasks
from tests.support.reference_files import reference_path

IMAGE_SIZES = ((128, 160), (96, 144))
SETTINGS = [
    "MODEL.DEVICE", "cpu",
    "MODEL.WEIGHTS", "",
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 100000,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE", 100000,
    "MODEL.RPN.POST_NMS_TOPK_TEST", 200,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN", 200,
    "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0,
    "MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH", 0.0,
    "TEST.DETECTIONS_PER_IMAGE", 20,
]  # fmt: skip


def zoo_config(name: str) -> CfgNode:
    """The config of zoo model `name`, without its YAML file."""
    cfg = get_cfg()
    keys = json.loads(reference_path("zoo_configs.json").read_text())[f"{name}.yaml"]
    cfg.merge_from_list([x for pair in keys.items() for x in pair])
    return cfg


def fill_module():
    """The reference's fill.py."""
    spec = importlib.util.spec_from_file_location("reference_fill", reference_path("fill.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def reference_model(name: str) -> torch.nn.Module:
    """Zoo model `name` with the settings and weights of the reference vectors."""
    cfg = zoo_config(name)
    cfg.merge_from_list(SETTINGS)
    model = build_model(cfg)
    fill = fill_module().fill
    state = model.state_dict()
    for key, value in state.items():
        if value.is_floating_point():
            value.copy_(torch.as_tensor(fill(key, tuple(value.shape))))
    model.load_state_dict(state)
    return model


def reference_inputs(
    num_classes: int = 80, keypoints: bool = False, semantic: bool = False
) -> list[dict]:
    """The two images with their ground truths."""
    image = fill_module().image
    inputs = []
    for i, (h, w) in enumerate(IMAGE_SIZES):
        rng = np.random.default_rng(100 + i)
        n = 3 + i
        x0, y0 = rng.uniform(0, w * 0.5, n), rng.uniform(0, h * 0.5, n)
        x1, y1 = x0 + rng.uniform(20, w * 0.45, n), y0 + rng.uniform(20, h * 0.45, n)
        instances = Instances((h, w))
        boxes = np.stack([x0, y0, x1, y1], axis=1)
        instances.gt_boxes = Boxes(torch.as_tensor(boxes, dtype=torch.float32))
        instances.gt_classes = torch.as_tensor(rng.integers(0, num_classes, n))
        polygons = np.stack([x0, y0, x1, y0 + 5, x1 - 3, y1, x0 + 4, y1 - 6], axis=1)
        instances.gt_masks = PolygonMasks([[p] for p in polygons])
        if keypoints:
            points = np.full((n, 17, 3), 2.0)
            points[..., 0] = rng.uniform(x0[:, None], x1[:, None], (n, 17))
            points[..., 1] = rng.uniform(y0[:, None], y1[:, None], (n, 17))
            instances.gt_keypoints = Keypoints(points)
        pixels = torch.as_tensor(image(i, h, w), dtype=torch.float32)
        inputs.append({"image": pixels, "height": h, "width": w, "instances": instances})
        if semantic:
            inputs[-1]["sem_seg"] = torch.as_tensor(rng.integers(0, 54, (h, w)))
    return inputs
