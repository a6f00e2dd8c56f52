import io
import itertools
import json
import logging
import os
import pickle

import numpy as np
import pytest
import torch
from torch.utils import data as torchdata

from d2kit.config import get_cfg
from d2kit.data import (
    DatasetCatalog,
    DatasetError,
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
    check_dataset_matches,
    get_detection_dataset_dicts,
    load_proposals_into_dataset,
    print_instances_class_histogram,
    register_dataset,
)
from d2kit.data.build import filter_images_with_few_keypoints
from d2kit.structures import BoxMode
from tests.data.conftest import coco


@pytest.fixture
def dataset(write_coco, names, tmp_path):
    """A registered dataset of two images, one with a crowd only."""
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).touch()
    name = names()
    register_dataset(name, write_coco(), tmp_path)
    return name


def test_filters_and_histogram(dataset, caplog):
    with caplog.at_level(logging.INFO):
        assert [r["image_id"] for r in get_detection_dataset_dicts(dataset)] == [7]
    assert "dog" in caplog.text
    assert "2 instances of 2 classes" in caplog.text
    both = get_detection_dataset_dicts([dataset], filter_empty=False)
    assert [r["image_id"] for r in both] == [3, 7]


def test_datasets_are_joined(dataset, write_coco, names, tmp_path):
    second = names()
    register_dataset(second, write_coco(name="again.json"), tmp_path)
    assert len(get_detection_dataset_dicts([dataset, second], filter_empty=False)) == 4


def test_classes_must_agree(dataset, write_coco, names, tmp_path):
    second = names()
    content = coco(categories=[{"id": 5, "name": "bird"}, {"id": 2, "name": "fish"}])
    register_dataset(second, write_coco(content, "other.json"), tmp_path)
    with pytest.raises(ValueError, match="thing_classes"):
        get_detection_dataset_dicts([dataset, second])


@pytest.mark.faults(25, fast=True)
def test_missing_images_are_named(dataset, tmp_path):
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(DatasetError, match=r"1 of 2 image files are missing") as caught:
        get_detection_dataset_dicts(dataset)
    assert caught.value.problems == [f"{tmp_path}/a.jpg: image file does not exist"]
    assert len(get_detection_dataset_dicts(dataset, check_consistency=False)) == 1


@pytest.mark.faults(25, fast=True)
def test_missing_images_of_large_folders(write_coco, names, tmp_path):
    images = [
        {"id": i, "file_name": f"{i % 2}/{i}.jpg", "height": 2, "width": 2} for i in range(300)
    ]
    (tmp_path / "0").mkdir()
    for image in images[4::2]:
        (tmp_path / image["file_name"]).touch()
    name = names()
    register_dataset(name, write_coco(coco(images=images, annotations=[])), tmp_path)
    with pytest.raises(DatasetError, match="152 of 300 image files") as caught:
        get_detection_dataset_dicts(name, filter_empty=False)
    assert caught.value.total == 152
    assert str(caught.value).endswith("... and 132 more")


def test_keys_that_are_no_paths_are_left_to_the_mapper(names):
    name = names()
    record = {"width": 1, "height": 1, "annotations": [{"category_id": 0}]}
    DatasetCatalog.register(
        name, lambda: [{**record, "file_name": f} for f in ("key", "s3://bucket/x")]
    )
    assert len(get_detection_dataset_dicts(name)) == 2


@pytest.mark.faults(25, fast=True)
def test_only_crowds(write_coco, names, tmp_path):
    content = coco()
    (tmp_path / "a.jpg").touch()
    name = names()
    crowds = coco(images=content["images"][1:], annotations=content["annotations"][2:])
    register_dataset(name, write_coco(crowds), tmp_path)
    with pytest.raises(ValueError, match=rf"no image of {name} can be trained on"):
        get_detection_dataset_dicts(name)


@pytest.mark.faults(25, fast=True)
def test_empty_dataset_and_no_name(names):
    name = names()
    DatasetCatalog.register(name, list)
    with pytest.raises(ValueError, match=f"'{name}' is empty"):
        get_detection_dataset_dicts(name)
    with pytest.raises(ValueError, match=r"DATASETS\.TRAIN"):
        get_detection_dataset_dicts([])
    with pytest.raises(KeyError, match="not registered"):
        get_detection_dataset_dicts(["zz_unknown"])


class Three(torchdata.Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, i):
        return i


def test_torch_datasets(names):
    name = names()
    three = Three()
    DatasetCatalog.register(name, lambda: three)
    assert get_detection_dataset_dicts(name) is three
    assert len(get_detection_dataset_dicts([name, name])) == 6


def test_few_keypoints():
    data = [
        {"annotations": [{"keypoints": [1, 1, 2, 1, 1, 0]}, {"keypoints": [0, 0, 1]}]},
        {"annotations": [{"keypoints": [1, 1, 0]}, {}]},
    ]
    assert filter_images_with_few_keypoints(data, 2) == data[:1]
    assert filter_images_with_few_keypoints(data, 3) == []


@pytest.mark.parametrize("category", [2, -1, "1", 0.5])
def test_class_outside_the_names(category):
    with pytest.raises(ValueError, match="2 classes"):
        print_instances_class_histogram([{"annotations": [{"category_id": category}]}], ["a", "b"])


@pytest.mark.faults(25, fast=True)
def test_class_count(dataset, names):
    check_dataset_matches(2, [dataset])
    with pytest.raises(
        ValueError, match=rf"80 classes, but dataset '{dataset}' has 2 \(dog, cat\)"
    ):
        check_dataset_matches(80, [dataset])
    with pytest.raises(KeyError, match="not registered"):
        check_dataset_matches(80, ["zz_unknown"])
    nameless = names()
    DatasetCatalog.register(nameless, list)
    check_dataset_matches(80, [nameless])


PROPOSALS = {
    "ids": [7, 3],
    "boxes": [[[0.0, 0, 1, 1], [0, 0, 2, 2]], [[0.0, 0, 3, 3], [1, 1, 2, 2]]],
    "objectness_logits": [[0.1, 0.9], [0.5, 0.4]],
}


def write_proposals(kind, path):
    if kind == "json":
        path.write_text(json.dumps(PROPOSALS))
    elif kind == "npz":
        np.savez(path, **{k: np.array(v) for k, v in PROPOSALS.items()})
    else:
        arrays = {k: [np.array(x) for x in v] for k, v in PROPOSALS.items()}
        old = {"indexes": arrays["ids"], "boxes": arrays["boxes"]}
        old |= {"scores": arrays["objectness_logits"], "bbox_mode": 0}
        path.write_bytes(pickle.dumps(old))


@pytest.mark.parametrize("kind", ["json", "npz", "pkl"])
def test_proposals(kind, tmp_path, dataset):
    path = tmp_path / f"proposals.{kind}"
    write_proposals(kind, path)
    data = get_detection_dataset_dicts(dataset, False, proposal_files=[str(path)])
    record = next(r for r in data if r["image_id"] == 7)
    assert record["proposal_boxes"].tolist() == [[0, 0, 2, 2], [0, 0, 1, 1]]
    assert record["proposal_objectness_logits"].tolist() == [np.float32(0.9), np.float32(0.1)]
    assert record["proposal_bbox_mode"] == BoxMode.XYXY_ABS
    with pytest.raises(ValueError, match="no proposals for image 8"):
        load_proposals_into_dataset([{"image_id": 8}], str(path))


class Gadget:
    def __reduce__(self):
        return os.system, ("touch /tmp/d2kit_gadget_ran",)


def gadget_npz():
    buffer = io.BytesIO()
    np.savez(buffer, ids=np.array([Gadget()], dtype=object))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("a.pkl", pickle.dumps(Gadget()), "system"),
        ("a.npz", gadget_npz(), "not a readable .npz"),
        ("a.json", b"[]", "dictionary"),
        ("a.json", b'{"ids": []}', "no 'boxes'"),
        ("a.json", b'{"ids": [1], "boxes": [], "scores": []}', "as many"),
        ("a.json", b'{"ids": [1], "boxes": [[[0,0,1,1]]], "scores": [[1, 2]]}', "2 scores"),
        ("a.json", b'{"ids": 1, "boxes": [], "scores": []}', "ids: expected a list"),
        ("a.json", b'{"ids": [1], "boxes": {}, "scores": [[1]]}', "boxes: expected a list"),
        ("a.json", b'{"ids": [1], "boxes": [[[0,0,1]]], "scores": [[1]]}', "image 1: boxes"),
        ("a.json", b'{"ids": [1], "boxes": [[[0,0,1],[1]]], "scores": [[1]]}', "image 1: boxes"),
        ("a.json", b'{"ids": [1], "boxes": [[[0,0,1,"x"]]], "scores": [[1]]}', "image 1: boxes"),
        ("a.json", b'{"ids": [1], "boxes": [[[0,0,1,NaN]]], "scores": [[1]]}', "boxes: .*finite"),
        ("a.json", b'{"ids": [1], "boxes": [[[0,0,1,1e30]]], "scores": [[1]]}', "image 1: boxes"),
        ("a.json", b'{"ids": [1], "boxes": [[[0,0,1,1]]], "scores": [{}]}', "image 1: objectness"),
        ("a.json", b'{"ids": [1], "boxes": [[]], "scores": [[]], "bbox_mode": 77}', "bbox_mode"),
        ("a.json", b'{"ids": [1], "boxes": [[]], "scores": [[]], "bbox_mode": []}', "bbox_mode"),
    ],
)
def test_bad_proposals(name, raw, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=message):
        load_proposals_into_dataset([{"image_id": 1}], str(path))
    assert not os.path.exists("/tmp/d2kit_gadget_ran")


def test_loaders_from_a_config_and_a_name(dataset):
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (dataset,)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH = 2
    batch = next(iter(build_detection_train_loader(cfg, mapper=dict)))
    assert [d["image_id"] for d in batch] == [7, 7]
    batches = list(build_detection_test_loader(cfg, dataset, mapper=dict))
    assert [b[0]["image_id"] for b in batches] == [3, 7]
    assert MetadataCatalog.get(dataset).thing_classes == ["dog", "cat"]


def mapped(cfg, n):
    """Everything that the default mapper made of the first `n` batches."""
    batches = itertools.islice(build_detection_train_loader(cfg), n)
    return [
        (d["image_id"], d["sample_seed"], d["image"], d["instances"].gt_boxes.tensor)
        for batch in batches
        for d in batch
    ]


def test_default_mapper_does_not_depend_on_workers(dataset, tmp_path):
    from PIL import Image

    rng = np.random.default_rng(0)
    for name, shape in (("a.jpg", (40, 20, 3)), ("b.jpg", (20, 30, 3))):
        Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(tmp_path / name)
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = (dataset,)
    cfg.MODEL.MASK_ON = True
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.SEED = 3
    cfg.INPUT.MIN_SIZE_TRAIN = (20, 24, 28, 32)
    cfg.INPUT.CROP.ENABLED = True
    made = []
    for workers in (0, 2):
        cfg.DATALOADER.NUM_WORKERS = workers
        made.append(mapped(cfg, 6))
    assert len({sample[2].shape for sample in made[0]}) > 1
    for one, other in zip(*made, strict=True):
        assert one[:2] == other[:2]
        assert torch.equal(one[2], other[2])
        assert torch.equal(one[3], other[3])
