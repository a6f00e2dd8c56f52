"""From the files of each public format, by its registration, to training and metrics."""

import json

import numpy as np
import pytest
from PIL import Image

from d2kit.data import DatasetCatalog, MetadataCatalog
from d2kit.data.datasets import (
    load_cityscapes_instances,
    load_cityscapes_semantic,
    register_coco_panoptic_separated,
    register_lvis_instances,
    register_pascal_voc,
)
from d2kit.engine import DefaultTrainer
from d2kit.evaluation.cityscapes_evaluation import THING_IDS
from d2kit.evaluation.sem_seg_evaluation import id_to_rgb
from tests.support import cityscapes_synthetic as city
from tests.support import voc_synthetic as voc
from tests.support.tiny_dense import tiny_dense_config

NAME = "zz_evaluate_datasets"
SIZE = 64, 80
CATEGORIES = [{"id": i, "name": n, "frequency": "f"} for i, n in ((2, "a"), (4, "b"), (9, "c"))]


def coco_files(folder, images=3):
    """Write images, instances (with LVIS's fields), segment and label images: two squares each."""
    for name in ("train2017", "segments", "labels"):
        (folder / name).mkdir()
    rng = np.random.default_rng(0)
    truth = {"images": [], "annotations": [], "categories": CATEGORIES}
    panoptic = {**truth, "images": truth["images"], "annotations": []}
    for number in range(images):
        Image.fromarray(rng.integers(0, 255, (*SIZE, 3), np.uint8)).save(
            folder / f"train2017/{number}.jpg"
        )
        ids, labels = np.full(SIZE, 500), np.full(SIZE, 1, np.uint8)  # all wall
        entry = {"id": number, "height": SIZE[0], "width": SIZE[1]}
        entry |= {"file_name": f"train2017/{number}.jpg", "neg_category_ids": [9]}
        truth["images"].append({**entry, "not_exhaustive_category_ids": [2]})
        segments = [{"id": 500, "category_id": 20, "iscrowd": 0, "area": 1, "bbox": [0, 0, 9, 9]}]
        for index, category in enumerate((2, 4)):
            x = 10 + 40 * index
            ids[10:30, x : x + 20], labels[10:30, x : x + 20] = 1000 + index, 0
            box = {"category_id": category, "bbox": [x, 10, 20, 20], "area": 400, "iscrowd": 0}
            outline = [[x, 10, x + 20, 10, x + 20, 30, x, 30]]
            row = {"id": len(truth["annotations"]) + 1, "image_id": number, "segmentation": outline}
            truth["annotations"].append({**box, **row})
            segments.append({**box, "id": 1000 + index})
        Image.fromarray(id_to_rgb(ids)).save(folder / f"segments/{number}.png")
        Image.fromarray(labels).save(folder / f"labels/{number}.png")
        panoptic["annotations"].append(
            {"image_id": number, "file_name": f"{number}.png", "segments_info": segments}
        )
    panoptic["categories"] = [{**c, "isthing": 1} for c in CATEGORIES]
    stuff = ((20, "wall"), (21, "floor"))
    panoptic["categories"] += [{"id": i, "name": name, "isthing": 0} for i, name in stuff]
    (folder / "instances.json").write_text(json.dumps(truth))
    (folder / "panoptic.json").write_text(json.dumps(panoptic))


def make_lvis(folder):
    coco_files(folder)
    register_lvis_instances(NAME, {}, str(folder / "instances.json"), str(folder))
    return "RetinaNet", NAME, 3


def make_panoptic(folder, kind="_separated"):
    coco_files(folder)
    truth = json.loads((folder / "instances.json").read_text())
    for image in truth["images"]:
        image["file_name"] = image["file_name"].removeprefix("train2017/")
    (folder / "instances.json").write_text(json.dumps(truth))
    metadata = {
        "thing_classes": ["a", "b", "c"],
        "thing_dataset_id_to_contiguous_id": {2: 0, 4: 1, 9: 2},
        "stuff_classes": ["things", "wall", "floor"],
        "stuff_dataset_id_to_contiguous_id": {0: 0, 20: 1, 21: 2},
    }
    names = ("train2017", "segments", "panoptic.json", "labels", "instances.json")
    register_coco_panoptic_separated(NAME, metadata, *(str(folder / name) for name in names))
    return ("PanopticFPN" if kind == "_separated" else "SemanticSegmentor"), NAME + kind, 3


def make_voc(folder):
    for image_id in voc.make(folder, images=3):
        Image.new("RGB", voc.SIZE[::-1]).save(folder / f"JPEGImages/{image_id}.jpg")
    register_pascal_voc(NAME, str(folder), "test", 2007, voc.CLASSES)
    return "RetinaNet", NAME, len(voc.CLASSES)


def make_cityscapes(folder, load=load_cityscapes_instances, kind="instance"):
    rng = np.random.default_rng(1)
    for number in range(3):
        city.write(folder, city.truth(rng), f"aachen_{number:06d}_000019")
    for labels in (folder / "gtFine/val/aachen").glob("*_labelIds.png"):
        train = np.asarray(Image.open(labels)) % 19
        Image.fromarray(train).save(str(labels).replace("labelIds", "labelTrainIds"))
    facts = {"image_dir": str(folder / "leftImg8bit/val"), "gt_dir": str(folder / "gtFine/val")}
    options = {"from_json": False} if kind == "instance" else {}
    DatasetCatalog.register(NAME, lambda: load(*facts.values(), **options))
    MetadataCatalog.get(NAME).set(**facts, evaluator_type=f"cityscapes_{kind}", ignore_label=255)
    MetadataCatalog.get(NAME).set(stuff_classes=[str(i) for i in range(19)])
    if kind == "instance":
        MetadataCatalog.get(NAME).set(thing_classes=list(THING_IDS))
        return "GeneralizedRCNN", NAME, 8
    return "SemanticSegmentor", NAME, 19


KINDS = {
    "lvis": (make_lvis, {"bbox": "APr"}),
    "panoptic": (
        make_panoptic,
        {"bbox": "AP", "segm": "AP", "sem_seg": "mIoU", "panoptic_seg": "PQ_th"},
    ),
    "stuff": (lambda folder: make_panoptic(folder, "_stuffonly"), {"sem_seg": "IoU-wall"}),
    "voc": (make_voc, {"bbox": "AP50"}),
    "cityscapes": (make_cityscapes, {"segm": "AP50"}),
    "cityscapes labels": (
        lambda folder: make_cityscapes(folder, load_cityscapes_semantic, "sem_seg"),
        {"sem_seg": "iIoU_sup"},
    ),
}


@pytest.fixture
def catalogs():
    yield
    for suffix in ("", "_separated", "_stuffonly"):
        for table in (DatasetCatalog, MetadataCatalog):
            table.data.pop(NAME + suffix, None)


class Trainer(DefaultTrainer):
    def build_writers(self):
        return super().build_writers()[:2]  # importing TensorBoard takes seconds


@pytest.mark.usefixtures("catalogs")
@pytest.mark.parametrize("kind", KINDS)
def test_train_and_evaluate(kind, tmp_path):
    make, expected = KINDS[kind]
    (tmp_path / "data").mkdir()
    model, name, classes = make(tmp_path / "data")
    cfg = tiny_dense_config("RetinaNet" if model == "GeneralizedRCNN" else model)
    cfg.merge_from_list(
        ["DATASETS.TRAIN", (name,), "DATASETS.TEST", (name,), "OUTPUT_DIR", str(tmp_path / "out")]
        + ["INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.MIN_SIZE_TEST", 64, "SEED", 1]
        + ["SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 2, "DATALOADER.NUM_WORKERS", 0]
        + ["MODEL.META_ARCHITECTURE", model, "MODEL.MASK_ON", name != NAME or classes == 8]
        + ["MODEL.RETINANET.NUM_CLASSES", classes, "MODEL.ROI_HEADS.NUM_CLASSES", classes]
        + ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", classes]
    )
    results = Trainer(cfg).train()
    assert list(results) == list(expected)
    for task, metric in expected.items():
        value = results[task][metric]
        assert np.isnan(value) or 0 <= value <= 100
    assert any(np.isfinite(v) for task in results.values() for v in task.values())
