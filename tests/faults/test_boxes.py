"""FAULTS 22: one image with 5,000 boxes at 3,000 pixels, in a process with bounded memory.

Fails without: the matching of anchors in chunks, or if a mask of the whole image is made per box.
"""

import resource

import numpy as np
import pytest
import torch

from d2kit.config import get_cfg
from d2kit.modeling import build_model
from d2kit.structures import Boxes, Instances
from d2kit.utils.events import EventStorage
from tests.support import fault_runs as runs

LIMIT = 3 << 30  # bytes of memory that a step may take beyond the model


def step(boxes, side, outcome):
    """Run a training step of a small Faster R-CNN; report its peak memory."""
    cfg = get_cfg()
    cfg.merge_from_list(
        ["MODEL.DEVICE", "cpu", "MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"]
        + ["MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 16]
        + ["MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.WIDTH_PER_GROUP", 8]
        + ["MODEL.RESNETS.OUT_FEATURES", ["res4", "res5"], "MODEL.FPN.OUT_CHANNELS", 8]
        + ["MODEL.FPN.IN_FEATURES", ["res4", "res5"], "MODEL.RPN.IN_FEATURES", ["p4", "p5", "p6"]]
        + ["MODEL.ANCHOR_GENERATOR.SIZES", [[64], [128], [256]]]
        + ["MODEL.ROI_HEADS.IN_FEATURES", ["p4", "p5"], "MODEL.ROI_HEADS.NAME", "StandardROIHeads"]
        + ["MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NUM_FC", 1]
        + ["MODEL.ROI_BOX_HEAD.FC_DIM", 8, "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 7]
    )
    model = build_model(cfg).train()
    rng = np.random.default_rng(0)
    corner = torch.from_numpy(rng.uniform(0, side - 60, (boxes, 2))).float()
    size = torch.from_numpy(rng.uniform(8, 60, (boxes, 2))).float()
    truth = Instances((side, side))
    truth.gt_boxes = Boxes(torch.cat([corner, corner + size], dim=1))
    truth.gt_classes = torch.zeros(boxes, dtype=torch.int64)
    sample = {"image": torch.zeros(3, side, side, dtype=torch.uint8), "instances": truth}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with EventStorage():
        losses = model([{**sample, "height": side, "width": side, "image_id": 0}])
    sum(losses.values()).backward()
    assert all(torch.isfinite(value) for value in losses.values())
    outcome.value = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


@pytest.mark.faults(22)
def test_five_thousand_boxes():
    used = runs.CONTEXT.Value("q", -1)
    assert runs.finish(runs.start(step, 5000, 3000, used), 1800) == 0
    assert 0 < used.value < LIMIT, f"{used.value:,} bytes"
