import json

import numpy as np
import pytest
import torch
from PIL import Image

from d2kit import evaluation
from d2kit.config import get_cfg
from d2kit.data import DatasetCatalog, MetadataCatalog
from d2kit.engine import DefaultTrainer

NAME = "zz_evaluators"
TRUTH = {
    "images": [{"id": 1, "height": 4, "width": 4, "file_name": "a.jpg"}],
    "categories": [{"id": 1, "name": "cat", "frequency": "r"}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 2, 2], "area": 4}],
}
TRUTH["images"][0]["neg_category_ids"] = [1]
TRUTH["images"][0]["not_exhaustive_category_ids"] = []
TRUTH["annotations"][0]["iscrowd"] = 0


@pytest.fixture
def facts(tmp_path):
    """Everything that any of the evaluators asks the metadata for."""
    (tmp_path / "truth.json").write_text(json.dumps(TRUTH))
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "a.png")
    record = {"file_name": "a.jpg", "sem_seg_file_name": str(tmp_path / "a.png")}
    DatasetCatalog.register(NAME, lambda: [record])
    folder = str(tmp_path)
    yield {
        "json_file": str(tmp_path / "truth.json"),
        "thing_classes": ["cat"],
        "stuff_classes": ["sky"],
        "thing_dataset_id_to_contiguous_id": {1: 0},
        "panoptic_json": "x.json",
        "panoptic_root": folder,
        "sem_seg_root": folder,
        **{key: folder for key in ("image_dir", "gt_dir", "dirname")},
        "split": "test",
        "year": 2007,
    }
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def build(facts, kind, *settings):
    cfg = get_cfg()
    cfg.merge_from_list(["OUTPUT_DIR", "output/x", *settings])
    MetadataCatalog.get(NAME).set(evaluator_type=kind, **facts)
    return DefaultTrainer.build_evaluator(cfg, NAME)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("coco", evaluation.COCOEvaluator),
        (None, evaluation.COCOEvaluator),
        ("lvis", evaluation.LVISEvaluator),
        ("pascal_voc", evaluation.PascalVOCDetectionEvaluator),
        ("sem_seg", evaluation.SemSegEvaluator),
        ("cityscapes_instance", evaluation.CityscapesInstanceEvaluator),
        ("cityscapes_sem_seg", evaluation.CityscapesSemSegEvaluator),
    ],
)
def test_kind_of_dataset_decides(facts, kind, expected):
    assert type(build(facts, kind)) is expected


@pytest.mark.parametrize(
    ("without", "expected"),
    [
        ((), ["COCOEvaluator", "SemSegEvaluator", "COCOPanopticEvaluator"]),
        (("sem_seg_root",), ["COCOEvaluator", "COCOPanopticEvaluator"]),
        (("sem_seg_root", "json_file"), ["COCOPanopticEvaluator"]),
    ],
)
def test_panoptic_datasets_have_several(facts, without, expected):
    evaluator = build({k: v for k, v in facts.items() if k not in without}, "coco_panoptic_seg")
    parts = getattr(evaluator, "_evaluators", [evaluator])
    assert [type(part).__name__ for part in parts] == expected


def test_sigmas_of_the_config(facts):
    assert build(facts, "coco", "TEST.KEYPOINT_OKS_SIGMAS", [0.1, 0.2])._kpt_oks_sigmas == [
        0.1,
        0.2,
    ]


def test_unknown_kind(facts):
    with pytest.raises(ValueError, match="'pascal_vco'; nearest pascal_voc"):
        build(facts, "pascal_vco")


class Noted(torch.nn.Linear):
    """A model that notes whether it computes in mixed precision."""

    def forward(self, batch):
        self.casts = torch.is_autocast_enabled("cpu")
        if batch == "break":
            raise OSError("broken")
        return [super().forward(torch.ones(1, 2))]


class Noting(evaluation.DatasetEvaluator):
    def process(self, inputs, outputs):
        self.found = torch.is_autocast_enabled("cpu"), outputs[0].dtype


class OneBatch(DefaultTrainer):
    batch = "a"

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        return [cls.batch]


@pytest.mark.usefixtures("facts")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_model_alone_computes_in_half_precision(precision, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    cfg = get_cfg()
    cfg.merge_from_list(["DATASETS.TEST", (NAME,), "TEST.DTYPE", precision])
    model, evaluator = Noted(2, 2), Noting()
    OneBatch.test(cfg, model, evaluator)
    assert model.casts is (precision == "bfloat16")
    assert evaluator.found == (False, getattr(torch, precision))
    monkeypatch.setattr(OneBatch, "batch", "break")
    with pytest.raises(OSError, match="broken"):
        OneBatch.test(cfg, model, evaluator)
    assert not torch.is_autocast_enabled("cpu")
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
