"""Loading files of torchvision and MMDetection: classes, messages, what cannot be loaded."""

import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from d2kit.checkpoint import DetectionCheckpointer
from d2kit.checkpoint.c2_model_loading import convert_weights, select_coco_classes, trained_classes
from d2kit.config import get_cfg
from d2kit.data.catalog import COCO_CATEGORIES
from d2kit.modeling import META_ARCH_REGISTRY
from tests.checkpoint.foreign import DATA, distinct, mmdetection_shapes, torchvision_shapes

CONFIGS = Path(__file__).parents[2] / "configs"
THINGS = [category["id"] for category in COCO_CATEGORIES if category["isthing"]]


def test_rows_of_coco_classes():
    ids = torch.arange(1.0, 91)
    file = {
        "roi_heads.box_predictor.cls_score.bias": torch.cat([ids, torch.tensor([0.0])]),
        "roi_heads.box_predictor.bbox_pred.bias": ids.repeat_interleave(4),
        "roi_heads.mask_head.predictor.bias": ids,
        "roi_heads.box_head.fc1.bias": torch.zeros(91),
    }
    sizes = (81, 320, 80, 81)
    model = {name: torch.empty(size) for name, size in zip(file, sizes, strict=True)}
    chosen, said = select_coco_classes(file, model)
    values = list(chosen.values())
    assert values[0].tolist() == [*THINGS, 0]
    assert values[1].view(-1, 4).unique(dim=1).flatten().tolist() == THINGS
    assert values[2].tolist() == THINGS
    assert values[3] is file["roi_heads.box_head.fc1.bias"]
    assert "COCO's category ids" in said
    assert select_coco_classes(file, file) == (file, "")


@pytest.mark.parametrize(("classes", "expected"), [(80, THINGS), (90, list(range(1, 91)))])
def test_rows_of_coco_classes_of_a_dense_head(classes, expected):
    file = {"head.cls_score.bias": torch.arange(91.0).repeat(2)}  # two anchors
    chosen, _ = select_coco_classes(file, {"head.cls_score.bias": torch.empty(2 * classes)})
    assert chosen["head.cls_score.bias"].view(2, -1).tolist() == [expected, expected]


def test_the_log_of_mmengine_is_passed_over(tmp_path, caplog):
    """The file was written by MMEngine 0.10; its log names classes that are not installed here."""
    with pytest.raises(pickle.UnpicklingError, match="HistoryBuffer"):
        torch.load(DATA / "mmengine_message_hub.pth", weights_only=True)
    model = torch.nn.Module()
    model.a = torch.nn.Parameter(torch.zeros(2))
    rest = DetectionCheckpointer(model).load(str(DATA / "mmengine_message_hub.pth"))
    assert model.a.tolist() == [1, 1]
    assert set(rest) == {"meta"}


def test_loading_says_whose_names_they_are(tmp_path, caplog):
    class Head(torch.nn.Module):
        def __init__(self, classes):
            super().__init__()
            self.roi_heads = torch.nn.Module()
            self.roi_heads.box_predictor = torch.nn.Module()
            self.roi_heads.box_predictor.cls_score = torch.nn.Linear(2, classes + 1)
            self.roi_heads.box_head = torch.nn.Module()
            self.roi_heads.box_head.fc1 = torch.nn.Linear(2, 2)

    bias = np.arange(81, dtype=np.float32)
    torch.save(
        {
            "module.rpn.head.cls_logits.weight": torch.ones(3, 1, 1, 1),
            "module.roi_heads.box_head.fc6.bias": torch.tensor([5.0, 6]),
            "module.roi_heads.box_predictor.cls_score.bias": torch.from_numpy(bias),
        },
        tmp_path / "t.pth",
    )
    model = Head(80)
    with caplog.at_level(logging.INFO):
        DetectionCheckpointer(model).load(str(tmp_path / "t.pth"))
    assert "t.pth has the names of torchvision's R-CNN" in caplog.text
    assert model.roi_heads.box_head.fc1.bias.tolist() == [5, 6]
    assert model.roi_heads.box_predictor.cls_score.bias.tolist() == [*range(1, 81), 0]
    other = Head(3)
    with caplog.at_level(logging.INFO):
        DetectionCheckpointer(other).load(str(tmp_path / "t.pth"))
    assert other.roi_heads.box_head.fc1.bias.tolist() == [5, 6]
    assert "for other classes: roi_heads.box_predictor.cls_score (81 -> 4)" in caplog.text


@pytest.mark.parametrize(
    ("checkpoint", "names"),
    [
        ({"meta": {"CLASSES": ("cat", "dog")}}, ["cat", "dog"]),
        ({"meta": {"dataset_meta": {"classes": ["cat"]}}}, ["cat"]),
        ({"meta": {"dataset_meta": {"CLASSES": "cat"}}}, ["cat"]),
        ({"meta": {}}, []),
        ({"meta": 3}, []),
        ({}, []),
    ],
)
def test_classes_that_mmdetection_notes(checkpoint, names):
    assert trained_classes(checkpoint) == names


def test_mobilenet_is_refused():
    theirs = distinct(torchvision_shapes("fasterrcnn_mobilenet_v3_large_fpn"))
    with pytest.raises(ValueError, match=r"of no ResNet.*fasterrcnn_mobilenet_v3_large_fpn"):
        convert_weights(theirs, "d2kit")


@pytest.mark.parametrize("name", ["faster_rcnn", "mask_rcnn", "retinanet", "cascade_rcnn"])
def test_configs_of_mmdetection_have_its_weights(name):
    """The model of the config has every weight that MMDetection's has, with its shape."""
    cfg = get_cfg()
    cfg.merge_from_file(str(CONFIGS / "mmdetection" / f"{name}_R_50_FPN.yaml"))
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
    shapes = {k: list(v.shape) for k, v in model.state_dict().items()}
    theirs = {
        k: torch.empty(s, device="meta")
        for k, s in mmdetection_shapes(f"{name}_r50_fpn").items()
        if not k.endswith("num_batches_tracked")
    }
    assert {k: list(v.shape) for k, v in convert_weights(theirs, "d2kit").items()} == shapes
