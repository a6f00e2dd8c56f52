"""One-stage and segmentation models from files to metrics and pictures."""

import math

import numpy as np
import pytest
import torch

from d2kit.data import DatasetCatalog, MetadataCatalog
from d2kit.engine import DefaultPredictor, DefaultTrainer
from d2kit.structures import BoxMode
from d2kit.visualization import Visualizer
from tests.support.tiny_dense import OPTIONS, labelled_input, tiny_dense_config

NAMES = {"coco": "dense_training_tests", "sem_seg": "dense_training_tests_semantic"}
THRESHOLDS = [
    "MODEL.RETINANET.SCORE_THRESH_TEST",
    "MODEL.FCOS.SCORE_THRESH_TEST",
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Four images with boxes, polygons and label images, on disk."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("dense")
    records = []
    for i in range(4):
        item = labelled_input(i, objects=i)
        height, width = item["sem_seg"].shape
        image = item["image"].permute(1, 2, 0).clamp(0, 255).byte().numpy()[:, :, ::-1]
        Image.fromarray(image).save(folder / f"{i}.png")
        Image.fromarray(item["sem_seg"].byte().numpy()).save(folder / f"{i}_labels.png")
        truth = item["instances"]
        annotations = [
            {
                "bbox": box,
                "bbox_mode": BoxMode.XYXY_ABS,
                "category_id": category,
                "segmentation": [[*box[:2], box[2], box[1], *box[2:], box[0], box[3]]],
            }
            for box, category in zip(
                truth.gt_boxes.tensor.tolist(), truth.gt_classes.tolist(), strict=True
            )
        ]
        records.append(
            {"file_name": str(folder / f"{i}.png"), "image_id": i, "height": height}
            | {"sem_seg_file_name": str(folder / f"{i}_labels.png"), "width": width}
            | {"annotations": annotations}
        )
    for kind, name in NAMES.items():
        DatasetCatalog.register(name, lambda: records)
        MetadataCatalog.get(name).set(
            evaluator_type=kind,
            thing_classes=["blue", "green", "red"],
            stuff_classes=["things", "wall", "floor"],
            ignore_label=255,
        )
    yield
    for name in NAMES.values():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def config(model, folder, *options):
    cfg = tiny_dense_config(model, *options)
    name = NAMES["sem_seg" if model == "SemanticSegmentor" else "coco"]
    cfg.merge_from_list(
        ["DATASETS.TRAIN", (name,), "DATASETS.TEST", (name,), "OUTPUT_DIR", str(folder)]
        + ["INPUT.MIN_SIZE_TRAIN", (48, 64), "INPUT.MIN_SIZE_TEST", 64, "SEED", 1]
        + ["SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 3, "DATALOADER.NUM_WORKERS", 0]
        + ["DATALOADER.FILTER_EMPTY_ANNOTATIONS", False, "INPUT.CROP.ENABLED", True]
    )
    return cfg


class Trainer(DefaultTrainer):
    def build_writers(self):
        return super().build_writers()[:2]  # importing TensorBoard takes seconds


@pytest.mark.usefixtures("dataset")
@pytest.mark.parametrize("model", OPTIONS)
def test_train_and_evaluate(model, tmp_path):
    # a score that no detection reaches: an evaluation without any
    cfg = config(model, tmp_path, *[x for key in THRESHOLDS for x in (key, 1.0)])
    trainer = Trainer(cfg)
    before = {k: v.clone() for k, v in trainer.model.named_parameters()}
    results = trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert any(not torch.equal(p, before[k]) for k, p in trainer.model.named_parameters())
    if model == "SemanticSegmentor":
        assert 0 <= results["sem_seg"]["mIoU"] <= 100
        assert math.isfinite(results["sem_seg"]["pACC"])
    else:
        assert results["bbox"]["AP"] == 0


@pytest.mark.usefixtures("dataset")
@pytest.mark.parametrize("model", OPTIONS)
def test_predict_and_draw(model, tmp_path):
    torch.manual_seed(0)
    lowest = [x for key in THRESHOLDS for x in (key, 0.0)]
    combine = "MODEL.PANOPTIC_FPN.COMBINE."
    lowest += [combine + "INSTANCES_CONFIDENCE_THRESH", 0.0, "TEST.DETECTIONS_PER_IMAGE", 5]
    predictor = DefaultPredictor(config(model, tmp_path, *lowest))
    image = np.full((40, 50, 3), 90, np.uint8)
    output = predictor(image)
    draw = {
        "instances": lambda v, x: v.draw_instance_predictions(x),
        "sem_seg": lambda v, x: v.draw_sem_seg(x.argmax(dim=0)),
        "panoptic_seg": lambda v, x: v.draw_panoptic_seg_predictions(*x),
    }
    expected = {
        "SemanticSegmentor": {"sem_seg"},
        "PanopticFPN": {"instances", "sem_seg", "panoptic_seg"},
    }
    assert set(output) == expected.get(model, {"instances"})
    for key, value in output.items():
        visualizer = Visualizer(image[:, :, ::-1], predictor.metadata, scale=2)
        picture = draw[key](visualizer, value).get_image()
        assert picture.shape == (80, 100, 3)
        assert (picture != 90).any(), key
