"""Every kind of R-CNN trains three steps from a config and is evaluated, on a tiny COCO dataset."""

import json
import pickle

import numpy as np
import pytest
import torch

from d2kit.contrib.point_rend import add_pointrend_config
from d2kit.data import build_detection_test_loader
from d2kit.utils.file_io import atomic_write
from tests.modeling.roi_heads.test_implicit_point_rend import IMPLICIT as IMPLICIT_OPTIONS
from tests.modeling.roi_heads.test_point_rend import OPTIONS as POINTREND_OPTIONS
from tests.support import rcnn_data
from tests.support.rcnn_data import train, training_config
from tests.support.tiny_heads import CASCADE_OPTIONS, KEYPOINT_OPTIONS
from tests.support.tiny_model import tiny_config

SIGMOID = ("MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True)
KINDS = {
    "mask": [],
    "keypoint": [*KEYPOINT_OPTIONS, "MODEL.MASK_ON", False],
    "cascade": CASCADE_OPTIONS,
    "cascade with keypoints": [*CASCADE_OPTIONS, *KEYPOINT_OPTIONS],
    "class-agnostic": [
        *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
        *("MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", True),
    ],
    "sigmoid": SIGMOID,
    "federated": [
        *SIGMOID,
        *("MODEL.ROI_BOX_HEAD.USE_FED_LOSS", True, "MODEL.ROI_BOX_HEAD.FED_LOSS_NUM_CLASSES", 2),
    ],
    "cascade with class weights": [*CASCADE_OPTIONS, "MODEL.ROI_HEADS.CLASS_WEIGHTS", "balanced"],
}


@pytest.fixture(scope="module", autouse=True)
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rcnn")
    rcnn_data.register(folder)
    yield folder
    rcnn_data.forget()


def check(trainer, results, tasks):
    assert set(results) == tasks
    for task in tasks:
        assert np.isfinite(results[task]["AP"]), task
    trained = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert trainer.with_gradient == trained
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_three_steps_and_evaluation(kind, tmp_path):
    cfg = training_config(tmp_path, *KINDS[kind])
    trainer, results = train(cfg)
    tasks = {"bbox"}
    tasks |= {"segm"} if cfg.MODEL.MASK_ON else set()
    tasks |= {"keypoints"} if cfg.MODEL.KEYPOINT_ON else set()
    check(trainer, results, tasks)


@pytest.mark.parametrize(
    "options", [POINTREND_OPTIONS, IMPLICIT_OPTIONS], ids=["plain", "implicit"]
)
def test_point_rend(options, tmp_path):
    base = tiny_config()
    add_pointrend_config(base)
    trainer, results = train(training_config(tmp_path, *options, base=base))
    check(trainer, results, {"bbox", "segm"})


PRECOMPUTED = [
    *("MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals", "MODEL.LOAD_PROPOSALS", True),
    *("DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN", 20),
    *("DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST", 10),
]


@pytest.fixture(scope="module")
def proposal_file(dataset, tmp_path_factory):
    """Proposals that an RPN of ours has written while it was evaluated."""
    folder = tmp_path_factory.mktemp("rpn")
    _, results = train(training_config(folder, "MODEL.META_ARCHITECTURE", "ProposalNetwork"))
    assert 0 <= results["box_proposals"]["AR@100"] <= 100
    return folder / "inference/box_proposals.pkl"


def test_fast_rcnn_on_the_proposals_of_an_rpn(proposal_file, tmp_path):
    files = (str(proposal_file),)
    trainer, results = train(
        training_config(
            tmp_path,
            *PRECOMPUTED,
            *("DATASETS.PROPOSAL_FILES_TRAIN", files, "DATASETS.PROPOSAL_FILES_TEST", files),
        )
    )
    assert trainer.model.proposal_generator is None
    check(trainer, results, {"bbox", "segm"})
    (first, *_) = build_detection_test_loader(trainer.cfg, rcnn_data.NAME)
    proposals = first[0]["proposals"]
    assert len(proposals) == 10
    assert (proposals.objectness_logits.diff() <= 0).all()
    with open(proposal_file, "rb") as file:
        table = pickle.load(file)  # our own
    row = table["ids"].index(first[0]["image_id"])
    assert proposals.objectness_logits[0] == pytest.approx(table["objectness_logits"][row].max())


@pytest.mark.faults(26, fast=True)
@pytest.mark.parametrize("count", [0, 1])
def test_few_proposals(count, tmp_path):
    box = [[5.0, 5, 30, 30]] * count
    table = {"ids": list(range(4)), "boxes": [box] * 4, "objectness_logits": [[1.0] * count] * 4}
    with atomic_write(tmp_path / "proposals.json", "w") as file:
        json.dump(table, file)
    files = (str(tmp_path / "proposals.json"),)
    trainer, results = train(
        training_config(
            tmp_path,
            *PRECOMPUTED,
            *("DATASETS.PROPOSAL_FILES_TRAIN", files, "DATASETS.PROPOSAL_FILES_TEST", files),
            *("MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", False),
        )
    )
    check(trainer, results, {"bbox", "segm"})


class Gadget:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_a_hostile_file_of_proposals_is_refused(tmp_path):
    ours, theirs = tmp_path / "proposals.pkl", tmp_path / "executed"
    table = {"ids": [0], "boxes": [Gadget(str(theirs))], "objectness_logits": [[1.0]]}
    with atomic_write(ours) as file:
        pickle.dump(table, file)
    files = (str(ours),)
    cfg = training_config(
        tmp_path,
        *PRECOMPUTED,
        *("DATASETS.PROPOSAL_FILES_TRAIN", files, "DATASETS.PROPOSAL_FILES_TEST", files),
    )
    with pytest.raises(ValueError, match="refus"):
        train(cfg)
    assert not theirs.exists()


def test_one_file_of_proposals_per_test_set(tmp_path):
    cfg = training_config(tmp_path, *PRECOMPUTED)
    with pytest.raises(ValueError, match="PROPOSAL_FILES_TEST"):
        build_detection_test_loader(cfg, rcnn_data.NAME)


def test_a_keypoint_model_is_tested_without_a_training_set(tmp_path):
    cfg = training_config(tmp_path, *KEYPOINT_OPTIONS, "DATASETS.TRAIN", ())
    assert len(build_detection_test_loader(cfg, rcnn_data.NAME)) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "least"),
    [("keypoint", {"bbox": 50, "keypoints": 30}), ("cascade", {"bbox": 50, "segm": 50})],
)
def test_learns_the_training_images(kind, least, tmp_path):
    """Measured: keypoint R-CNN box AP 70, keypoint AP 55; cascade box AP 77, mask AP 72."""
    _, results = train(
        training_config(
            tmp_path,
            *KINDS[kind],
            *("SOLVER.MAX_ITER", 200, "SOLVER.BASE_LR", 0.02, "SOLVER.STEPS", (160,)),
            *("SOLVER.IMS_PER_BATCH", 4, "SOLVER.WARMUP_ITERS", 20),
            *("SOLVER.CLIP_GRADIENTS.ENABLED", True, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 32),
        )
    )
    for task, ap in least.items():
        assert results[task]["AP"] > ap, task
