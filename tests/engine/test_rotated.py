"""A rotated detector through the whole workflow: registered, trained, evaluated, drawn."""

import cv2
import pytest

from d2kit.data import DatasetCatalog, MetadataCatalog
from d2kit.engine import DefaultTrainer
from d2kit.evaluation import RotatedCOCOEvaluator
from d2kit.structures import BoxMode
from tests.support.rotated import CLASSES, rotated_config, rotated_scene

NAME = "engine_tests_rotated"


def records(folder, count=6):
    found = []
    for i in range(count):
        image, boxes, classes = rotated_scene(i, objects=i % 3)  # images without objects, too
        path = folder / f"{i}.png"
        if not path.exists():
            cv2.imwrite(str(path), image)
        found.append(
            {
                "file_name": str(path),
                "image_id": i,
                "height": image.shape[0],
                "width": image.shape[1],
                "annotations": [
                    {"bbox": b.tolist(), "bbox_mode": BoxMode.XYWHA_ABS, "category_id": int(c)}
                    for b, c in zip(boxes, classes, strict=True)
                ],
            }
        )
    return found


class Trainer(DefaultTrainer):
    def build_writers(self):
        return super().build_writers()[:2]  # importing TensorBoard takes seconds


@pytest.fixture
def dataset(tmp_path):
    DatasetCatalog.register(NAME, lambda: records(tmp_path))
    MetadataCatalog.get(NAME).set(
        thing_classes=[f"c{i}" for i in range(CLASSES)], evaluator_type="rotated_coco"
    )
    yield NAME
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def test_train_and_evaluate(dataset, tmp_path):
    cfg = rotated_config(
        *("DATASETS.TRAIN", (dataset,), "DATASETS.TEST", (dataset,)),
        *("INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.MIN_SIZE_TEST", 64, "VIS_PERIOD", 2),
        *("SOLVER.MAX_ITER", 3, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.BASE_LR", 0.001),
        *("DATALOADER.NUM_WORKERS", 0, "OUTPUT_DIR", str(tmp_path / "out")),
    )
    trainer = Trainer(cfg)
    assert isinstance(trainer.build_evaluator(cfg, dataset), RotatedCOCOEvaluator)
    results = trainer.train()
    assert 0 <= results["bbox"]["AP"] <= 100
    assert (tmp_path / "out/model_final.pth").exists()
