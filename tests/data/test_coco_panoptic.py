import copy
import json

import numpy as np
import pytest
from PIL import Image

from d2kit.data import DatasetCatalog, DatasetError, MetadataCatalog
from d2kit.data.catalog import _get_builtin_metadata
from d2kit.data.datasets import (
    load_coco_panoptic_json,
    register_coco_panoptic,
    register_coco_panoptic_separated,
)

META = _get_builtin_metadata("coco_panoptic_separated")


def content():
    """Two images: a person (1), grass (193), a crowd of dogs (18)."""
    return {
        "images": [{"id": 4, "file_name": "b.jpg", "height": 9, "width": 8}],
        "annotations": [
            {
                "image_id": 4,
                "file_name": "b.png",
                "segments_info": [
                    {"id": 70000, "category_id": 1, "iscrowd": 0, "area": 9},
                    {"id": 3, "category_id": 193, "iscrowd": 0, "area": 9},
                ],
            },
            {
                "image_id": 2,
                "file_name": "a.png",
                "segments_info": [{"id": 5, "category_id": 18, "iscrowd": 1, "area": 72}],
            },
        ],
    }


def write(folder, data):
    (folder / "panoptic.json").write_text(json.dumps(data))
    return str(folder / "panoptic.json")


def test_load(tmp_path):
    records = load_coco_panoptic_json(write(tmp_path, content()), "images", "segments", META)
    assert records[1] == {
        "file_name": "images/a.jpg",
        "image_id": 2,
        "pan_seg_file_name": "segments/a.png",
        "segments_info": [
            {"id": 5, "category_id": 16, "isthing": True, "iscrowd": 1, "area": 72},
        ],
    }
    grass = records[0]["segments_info"][1]
    assert not grass["isthing"]
    assert META["stuff_classes"][grass["category_id"]] == "grass-merged"
    standard = _get_builtin_metadata("coco_panoptic_standard")
    again = load_coco_panoptic_json(write(tmp_path, content()), "images", "segments", standard)
    for record in again:
        for segment in record["segments_info"]:
            names = standard["thing_classes" if segment["isthing"] else "stuff_classes"]
            assert names[segment["category_id"]] in ("person", "dog", "grass-merged")


def damaged(*path_and_value):
    data = copy.deepcopy(content())
    *path, last, value = path_and_value
    place = data
    for step in path:
        place = place[step]
    place[last] = value
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "expected an object"),
        (damaged("annotations", None), "annotations: expected a list"),
        (damaged("annotations", 0, 5), "annotation number 0: entry"),
        (damaged("annotations", 0, "image_id", "4"), "image 4: image_id: expected an integer"),
        (damaged("annotations", 1, "image_id", 4), "image 4: image_id: used twice"),
        (damaged("annotations", 0, "file_name", "../../x.png"), "image 4: file_name.*outside"),
        (damaged("annotations", 0, "file_name", "http://x/y.png"), "image 4: file_name"),
        (damaged("annotations", 0, "file_name", None), "image 4: file_name: expected a name"),
        (damaged("annotations", 0, "segments_info", {}), "image 4: segments_info: expected a list"),
        (damaged("annotations", 0, "segments_info", [7]), "image 4: segments_info: expected id"),
        (
            damaged("annotations", 0, "segments_info", 0, "category_id", 999),
            "image 4: category_id: segment 70000: 999 is no category",
        ),
    ],
)
def test_defects_are_one_line(tmp_path, data, message):
    path = write(tmp_path, data)
    with pytest.raises(DatasetError, match=message) as caught:
        load_coco_panoptic_json(path, "images", str(tmp_path), META)
    assert str(caught.value).startswith(path)


@pytest.fixture
def registered(tmp_path):
    names = ["zz_coco_pan", "zz_coco_pan_separated", "zz_coco_pan_stuffonly"]
    (tmp_path / "images").mkdir()
    (tmp_path / "stuff").mkdir()
    for name in "ab":
        Image.fromarray(np.zeros((9, 8, 3), np.uint8)).save(tmp_path / f"images/{name}.jpg")
        Image.fromarray(np.zeros((9, 8), np.uint8)).save(tmp_path / f"stuff/{name}.png")
    categories = [
        {"id": k, "name": META["thing_classes"][v]}
        for k, v in META["thing_dataset_id_to_contiguous_id"].items()
    ]
    box = {"id": 1, "image_id": 4, "category_id": 1, "bbox": [1, 1, 3, 3], "iscrowd": 0, "area": 9}
    instances = {**content(), "categories": categories, "annotations": [box]}
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    folders = (str(tmp_path / "images"), str(tmp_path / "seg"), write(tmp_path, content()))
    instances_json = str(tmp_path / "instances.json")
    register_coco_panoptic(
        names[0], _get_builtin_metadata("coco_panoptic_standard"), *folders, instances_json
    )
    register_coco_panoptic_separated(
        names[0], META, *folders, str(tmp_path / "stuff"), instances_json
    )
    yield names, tmp_path
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_three_datasets(registered):
    (whole, separated, stuff), folder = registered
    assert [r["image_id"] for r in DatasetCatalog.get(whole)] == [4, 2]
    (record,) = DatasetCatalog.get(separated)
    assert record["sem_seg_file_name"] == str(folder / "stuff/b.png")
    assert record["annotations"][0]["category_id"] == 0
    assert len(DatasetCatalog.get(stuff)) == 2
    kinds = [MetadataCatalog.get(n).evaluator_type for n in (whole, separated, stuff)]
    assert kinds == ["coco_panoptic_seg", "coco_panoptic_seg", "sem_seg"]
    assert MetadataCatalog.get(stuff).ignore_label == 255


def test_image_without_label_image(registered):
    (_, separated, _), folder = registered
    (folder / "stuff/b.png").unlink()
    with pytest.raises(ValueError, match=r"b\.jpg has no label image \(1 of 1 images\)"):
        DatasetCatalog.get(separated)
