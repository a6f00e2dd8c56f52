"""A detector of a few thousand weights for fast tests: two levels, 32-pixel objects."""

import torch
from torch import nn

from d2kit.config import CfgNode, get_cfg
from d2kit.layers import ShapeSpec
from d2kit.modeling import BACKBONE_REGISTRY, Backbone
from d2kit.structures import Boxes, Instances, PolygonMasks

CHANNELS = 16


class TinyBackbone(Backbone):
    def __init__(self, cfg: CfgNode, input_shape: ShapeSpec):
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 5, stride=4, padding=2)
        self.down = nn.Conv2d(CHANNELS, CHANNELS, 3, stride=2, padding=1)

    def forward(self, x):
        p2 = self.stem(x).relu()
        return {"p2": p2, "p3": self.down(p2).relu()}

    def output_shape(self):
        return {
            "p2": ShapeSpec(channels=CHANNELS, stride=4),
            "p3": ShapeSpec(channels=CHANNELS, stride=8),
        }

    @property
    def size_divisibility(self):
        return 8


if "TinyBackbone" not in BACKBONE_REGISTRY:
    BACKBONE_REGISTRY.register(TinyBackbone)


def tiny_config(*options) -> CfgNode:
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "TinyBackbone"
    cfg.MODEL.PIXEL_STD = [57.0, 57.0, 57.0]
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32]]
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3"]
    cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = 32
    cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN = cfg.MODEL.RPN.PRE_NMS_TOPK_TEST = 100
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 50
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3"]
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 16
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 32
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 4
    cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = 1
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 8
    cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION = 4
    cfg.merge_from_list(list(options))
    return cfg


def tiny_input(seed: int, objects: int = 2, size: tuple[int, int] = (64, 80)) -> dict:
    """An image with `objects` bright rectangles, as the mapper gives it."""
    rng = torch.Generator().manual_seed(seed)
    h, w = size
    image = torch.rand(3, h, w, generator=rng) * 60
    corner = torch.rand(objects, 2, generator=rng) * torch.tensor([w * 0.5, h * 0.5])
    side = 12 + torch.rand(objects, 2, generator=rng) * 20
    boxes = torch.cat([corner, corner + side], dim=1)
    classes = torch.randint(0, 3, (objects,), generator=rng)
    for (x0, y0, x1, y1), c in zip(boxes.long().tolist(), classes.tolist(), strict=True):
        image[c, y0:y1, x0:x1] += 150
    instances = Instances(size, gt_boxes=Boxes(boxes), gt_classes=classes)
    instances.gt_masks = PolygonMasks(
        [
            [torch.tensor([x0, y0, x1, y0, x1, y1, x0, y1]).double().numpy()]
            for x0, y0, x1, y1 in boxes
        ]
    )
    return {
        "image": image,
        "height": h,
        "width": w,
        "instances": instances,
        "sample_seed": 1000 + seed,
    }
