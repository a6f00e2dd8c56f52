import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_util

from d2kit.data import DatasetError
from d2kit.data.datasets import load_cityscapes_instances, load_cityscapes_semantic
from d2kit.data.datasets.cityscapes import ground_truth_file
from d2kit.structures.masks import polygons_to_bitmask
from tests.support import cityscapes_synthetic as city


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng(4)
    for number, place in ((0, "aachen"), (1, "aachen"), (2, "bonn")):
        ids = city.truth(rng, things=0 if number == 1 else 12)
        city.write(tmp_path, ids, f"{place}_{number:06d}_000019", city=place)
    return tmp_path


def folders(root):
    return str(root / "leftImg8bit/val"), str(root / "gtFine/val")


@pytest.mark.parametrize("to_polygons", [True, False])
def test_instances_of_label_images(root, to_polygons):
    records = load_cityscapes_instances(*folders(root), from_json=False, to_polygons=to_polygons)
    names = [
        f"{c}_{i:06d}_000019_leftImg8bit.png"
        for c, i in (("aachen", 0), ("aachen", 1), ("bonn", 2))
    ]
    assert [r["image_id"] for r in records] == names
    assert records[1]["annotations"] == []
    for record in records:
        truth = ground_truth_file(record["file_name"], *folders(root), "instanceIds.png")
        ids = np.asarray(Image.open(truth)).astype(int)
        labels = city.labels_of(ids)
        wanted = [v for v in np.unique(ids) if np.unique(labels[ids == v])[0] in city.THINGS]
        assert len(record["annotations"]) == len(wanted)
        for value, annotation in zip(wanted, record["annotations"], strict=True):
            mask = ids == value
            ys, xs = np.nonzero(mask)
            assert annotation["bbox"] == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            assert annotation["iscrowd"] == (value < 1000)
            label = value if value < 1000 else value // 1000
            assert annotation["category_id"] == city.THINGS.index(label)
            if to_polygons:
                polygons = [np.array(p) for p in annotation["segmentation"]]
                drawn = polygons_to_bitmask(polygons, *mask.shape)
            else:
                drawn = mask_util.decode(annotation["segmentation"]).astype(bool)
            assert (drawn == mask)[~_holes(mask)].all()


def _holes(mask):
    """Pixels that outer outlines cannot leave out."""
    from scipy.ndimage import binary_fill_holes

    return binary_fill_holes(mask, np.ones((3, 3))) & ~mask


def square(x, y, side):
    return [[x, y], [x + side, y], [x + side, y + side], [x, y + side]]


def write_polygons(root, objects, **other):
    data = {"imgHeight": city.HEIGHT, "imgWidth": city.WIDTH, "objects": objects, **other}
    place = root / "gtFine/val"
    for truth in place.glob("*/*_instanceIds.png"):
        path = str(truth).replace("instanceIds.png", "polygons.json")
        with open(path, "w") as file:
            json.dump(data, file)


def test_instances_of_polygons(root):
    write_polygons(
        root,
        [
            {"label": "road", "polygon": square(0, 0, 90)},
            {"label": "car", "polygon": square(10, 10, 20)},
            {"label": "person", "polygon": square(20, 10, 20)},  # hides the car's right half
            {"label": "license plate", "polygon": square(12, 12, 3)},
            {"label": "bicyclegroup", "polygon": square(60, 60, 20)},
            {"label": "bus", "polygon": square(100, 50, 10)},
            {"label": "sky", "polygon": square(90, 40, 40)},  # hides the bus
            {"label": "truck", "polygon": square(150, 80, 30)},  # reaches beyond the image
            {"label": "train", "polygon": square(0, 0, 5), "deleted": 1},
        ],
    )
    record = load_cityscapes_instances(*folders(root))[0]
    assert (record["height"], record["width"]) == (city.HEIGHT, city.WIDTH)
    car, person, bicycles, truck = record["annotations"]
    assert car["bbox"] == [10, 10, 20, 31]
    assert person["segmentation"] == [[20, 10, 40, 10, 40, 30, 20, 30]]
    assert person["bbox"] == [20, 10, 41, 31]
    assert (bicycles["iscrowd"], bicycles["category_id"]) == (1, 7)
    assert truck["bbox"] == [150, 80, city.WIDTH, city.HEIGHT]
    assert [a["category_id"] for a in (car, person, truck)] == [2, 0, 3]
    runs = load_cityscapes_instances(*folders(root), to_polygons=False)[0]["annotations"]
    assert mask_util.area(runs[0]["segmentation"]) == 10 * 21


@pytest.mark.parametrize(
    ("objects", "other", "message"),
    [
        ([{"label": "car", "polygon": [[1, "x"]]}], {}, "object number 0: polygon"),
        ([{"label": "car", "polygon": []}], {}, "object number 0: polygon"),
        ([{"label": "car", "polygon": [[1, float("nan")]]}], {}, "object number 0: polygon"),
        ([{"polygon": [[1, 2]]}], {}, "object number 0: label"),
        ([7], {}, "object number 0: label"),
        ({}, {}, "objects: expected a list"),
        ([], {"imgHeight": 10**9}, "imgHeight, imgWidth"),
    ],
)
def test_damaged_polygons(root, objects, other, message):
    write_polygons(root, objects, **other)
    with pytest.raises(DatasetError, match=message) as caught:
        load_cityscapes_instances(*folders(root))
    assert "polygons.json" in str(caught.value)


def test_label_images(root):
    with pytest.raises(FileNotFoundError, match="createTrainIdLabelImgs"):
        load_cityscapes_semantic(*folders(root))
    for truth in (root / "gtFine/val").glob("*/*_labelIds.png"):
        Image.open(truth).save(str(truth).replace("labelIds", "labelTrainIds"))
    record = load_cityscapes_semantic(*folders(root))[2]
    assert record == {
        "file_name": str(root / "leftImg8bit/val/bonn/bonn_000002_000019_leftImg8bit.png"),
        "sem_seg_file_name": str(
            root / "gtFine/val/bonn/bonn_000002_000019_gtFine_labelTrainIds.png"
        ),
        "height": city.HEIGHT,
        "width": city.WIDTH,
    }


def test_missing_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_cityscapes_instances(str(tmp_path / "none"), str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="leftImg8bit"):
        load_cityscapes_instances(str(tmp_path / "empty"), str(tmp_path))


def test_names_of_ground_truth():
    file = "cs/leftImg8bit/train/x/x_1_2_leftImg8bit.png"
    coarse = ground_truth_file(file, "cs/leftImg8bit/train", "cs/gtCoarse/train", "a.png")
    assert coarse == "cs/gtCoarse/train/x/x_1_2_gtCoarse_a.png"
    with pytest.raises(ValueError, match="below 'cs/leftImg8bit/val'"):
        ground_truth_file(file, "cs/leftImg8bit/val", "cs/gtFine/val", "a.png")
