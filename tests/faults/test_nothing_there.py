"""FAULTS 26: batches without boxes, images without proposals, evaluations without detections.

Fails without: dividing by at least 1 in the losses (`clamp(min=1)`; NaN), or the evaluators' zeros
for what was not found.
"""

import json

import numpy as np
import pytest
import torch

from d2kit.data.datasets import register_coco_instances
from tests.engine.test_rcnn_end_to_end import KINDS
from tests.support import rcnn_data
from tests.support.rcnn_data import train, training_config

KEEP = (
    *("DATALOADER.FILTER_EMPTY_ANNOTATIONS", False),
    *("MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE", 0),
)


@pytest.fixture(autouse=True)
def dataset(tmp_path):
    """Register four images, of which three have no annotation: some batches of two have no box."""
    path = rcnn_data.write_dataset(tmp_path)
    content = json.loads(path.read_text())
    kept = [a for a in content["annotations"] if a["image_id"] == 0]
    path.write_text(json.dumps({**content, "annotations": kept}))
    rcnn_data.forget()
    register_coco_instances(rcnn_data.NAME, rcnn_data.KEYPOINT_META, path, tmp_path)
    yield
    rcnn_data.forget()


@pytest.mark.faults(26)
@pytest.mark.parametrize("kind", ["mask", "cascade with keypoints", "federated"])
def test_finite_losses_and_ap(kind, tmp_path):
    nothing_found = ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 1.0, "SOLVER.MAX_ITER", 4)
    cfg = training_config(tmp_path / "run", *KINDS[kind], *nothing_found, *KEEP)
    trainer, results = train(cfg)
    rows = [json.loads(x) for x in (tmp_path / "run/metrics.json").read_text().splitlines()]
    losses = {k: v for row in rows for k, v in row.items() if "loss" in k}
    assert len(losses) >= 4
    assert np.isfinite(list(losses.values())).all(), losses
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert "bbox" in results
    assert {task: found["AP"] for task, found in results.items()} == dict.fromkeys(results, 0)


@pytest.mark.faults(26)
def test_no_proposal_of_the_rpn(tmp_path):
    """Not even the boxes of the ground truth are added."""
    nothing = ("MODEL.RPN.POST_NMS_TOPK_TRAIN", 0, "MODEL.RPN.POST_NMS_TOPK_TEST", 0)
    append = ("MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", False)
    trainer, results = train(training_config(tmp_path / "run", *nothing, *KEEP, *append))
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert results["bbox"]["AP"] == 0
