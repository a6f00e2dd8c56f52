"""Features, proposals and ground truths for tests of the per-region heads."""

import torch

from d2kit.structures import Boxes, Instances, Keypoints
from tests.support.tiny_model import CHANNELS

SIZE = (64, 80)
KEYPOINTS = 3
KEYPOINT_OPTIONS = [
    *("MODEL.KEYPOINT_ON", True),
    *("MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", KEYPOINTS),
    *("MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", (8,)),
    *("MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION", 4),
]
CASCADE_OPTIONS = [
    *("MODEL.ROI_HEADS.NAME", "CascadeROIHeads"),
    *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
]


def features(images):
    rng = torch.Generator().manual_seed(1)
    return {
        "p2": torch.randn(images, CHANNELS, 16, 20, generator=rng),
        "p3": torch.randn(images, CHANNELS, 8, 10, generator=rng),
    }


def random_proposals(count, seed=0):
    rng = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=rng) * 40
    boxes = torch.cat([corner, corner + 4 + torch.rand(count, 2, generator=rng) * 20], 1)
    return Instances(SIZE, proposal_boxes=Boxes(boxes), objectness_logits=torch.zeros(count))


def with_keypoints(item):
    """Add to an input the two upper corners' insides and the centre of each box as keypoints."""
    boxes = item["instances"].gt_boxes.tensor
    start, size = boxes[:, None, :2], boxes[:, None, 2:] - boxes[:, None, :2]
    places = torch.tensor([[0.1, 0.1], [0.9, 0.1], [0.5, 0.5]])
    points = torch.cat([start + size * places, torch.full((len(boxes), 3, 1), 2.0)], dim=2)
    item["instances"].gt_keypoints = Keypoints(points)
    return item
