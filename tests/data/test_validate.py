import json
import logging
import time

import pytest
from pycocotools import mask as mask_util

from d2kit.data import DatasetError
from d2kit.data.datasets import load_coco_json
from tests.data.conftest import coco

NAN, INF = float("nan"), float("inf")


def load(content, write_coco, root="images", **kwargs):
    return load_coco_json(write_coco(content), root, **kwargs)


def rle(**changes):
    return {"size": [20, 30], "counts": [0, 40, 560], **changes}


# What is set in annotation 1 (image 7 of 30 x 20 pixels), and the field that the line names.
DEFECTS = {
    "duplicate id": ({"id": 2}, "id", "twice"),
    "id as text": ({"id": "1"}, "id", "integer"),
    "unknown category": ({"category_id": 99}, "category_id", "99"),
    "category as text": ({"category_id": "5"}, "category_id", "'5'"),
    "unknown image": ({"image_id": 99}, "image_id", "99"),
    "image as list": ({"image_id": [7]}, "image_id", "integer"),
    "NaN box": ({"bbox": [NAN, 2, 3, 4]}, "bbox", "nan"),
    "infinite box": ({"bbox": [1, 2, INF, 4]}, "bbox", "inf"),
    "negative size": ({"bbox": [5, 5, -3, 4]}, "bbox", "x, y, x, y"),
    "negative box": ({"bbox": [-50, -50, 10, 10]}, "bbox", "outside"),
    "inverted box": ({"bbox": [20, 15, -10, -10]}, "bbox", "size >= 0"),
    "box as text": ({"bbox": ["1", "2", "3", "4"]}, "bbox", "finite"),
    "box of three": ({"bbox": [1, 2, 3]}, "bbox", "4 finite"),
    "rotated box, inverted": ({"bbox": [10, 10, -4, 4, 30]}, "bbox", "size >= 0"),
    "rotated box, outside": ({"bbox": [-50, 10, 8, 8, 30]}, "bbox", "outside"),
    "rotated box, NaN": ({"bbox": [10, 10, 4, 4, NAN]}, "bbox", "4 finite"),
    "empty box": ({"bbox": []}, "bbox", "4 finite"),
    "null box": ({"bbox": None}, "bbox", "None"),
    "box of lists": ({"bbox": [[1], [2], [3], [4]]}, "bbox", "4 finite"),
    "box is a number": ({"bbox": 7}, "bbox", "4 finite"),
    "huge integer": ({"bbox": [10**400, 1, 1, 1]}, "bbox", "4 finite"),
    "NaN area": ({"area": NAN}, "area", "number"),
    "area as text": ({"area": "80"}, "area", "number"),
    "crowd of two": ({"iscrowd": 2}, "iscrowd", "0 or 1"),
    "crowd as text": ({"iscrowd": "1"}, "iscrowd", "0 or 1"),
    "ignore": ({"ignore": 1}, "ignore", "only 0"),
    "empty polygon": ({"segmentation": [[]]}, "segmentation", "at least 6"),
    "odd polygon": ({"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, "segmentation", "even"),
    "2-point polygon": ({"segmentation": [[1, 2, 3, 4]]}, "segmentation", "at least 6"),
    "one bad of two": ({"segmentation": [[1, 2, 3, 4, 5, 6], [1]]}, "segmentation", "even"),
    "flat list": ({"segmentation": [1, 2, 11, 2, 11, 10]}, "segmentation", "flat list"),
    "NaN polygon": ({"segmentation": [[1, 2, 3, NAN, 5, 6]]}, "segmentation", "finite"),
    "polygon as text": ({"segmentation": [["1", 2, 3, 4, 5, 6]]}, "segmentation", "finite"),
    "points": ({"segmentation": [[[1, 2], [3, 4], [5, 6]]]}, "segmentation", "finite"),
    "mask as text": ({"segmentation": "abc"}, "segmentation", "list of polygons"),
    "crowd without RLE": ({"iscrowd": 1}, "segmentation", "run-length"),
    "crowd without mask": ({"iscrowd": 1, "segmentation": []}, "segmentation", "run-length"),
    "RLE of the wrong size": ({"segmentation": rle(size=[30, 20])}, "segmentation", "size"),
    "RLE without size": ({"segmentation": {"counts": [600]}}, "segmentation", "size"),
    "RLE size as text": ({"segmentation": rle(size=["20", 30])}, "segmentation", "size"),
    "RLE without counts": ({"segmentation": {"size": [20, 30]}}, "segmentation", "counts"),
    "RLE too short": ({"segmentation": rle(counts=[10, 20])}, "segmentation", "30 pixels"),
    "RLE negative": ({"segmentation": rle(counts=[700, -100])}, "segmentation", "negative"),
    "RLE of floats": ({"segmentation": rle(counts=[599.5, 0.5])}, "segmentation", "counts"),
    "RLE overflow": ({"segmentation": rle(counts=[2**70])}, "segmentation", "longer"),
    "RLE text damaged": ({"segmentation": rle(counts="0Pi")}, "segmentation", "within a number"),
    "RLE text foreign": ({"segmentation": rle(counts="hello \x01")}, "segmentation", "character"),
    "RLE not ASCII": ({"segmentation": rle(counts="é")}, "segmentation", "counts"),
    "RLE text too long": ({"segmentation": rle(counts="P" * 40 + "0")}, "segmentation", "long"),
    "RLE text of other size": ({"segmentation": rle(counts="0Pi0")}, "segmentation", "pixels"),
    "RLE text empty": ({"segmentation": rle(counts="")}, "segmentation", "0 pixels"),
    "keypoints odd": ({"keypoints": [1, 2]}, "keypoints", "finite"),
    "keypoints NaN": ({"keypoints": [1, NAN, 2]}, "keypoints", "finite"),
    "keypoints as text": ({"keypoints": ["1", 2, 2]}, "keypoints", "finite"),
}


@pytest.mark.faults(24, fast=True)
@pytest.mark.parametrize("case", DEFECTS)
def test_annotation_defect_is_one_line(case, write_coco):
    change, field, what = DEFECTS[case]
    content = coco()
    content["annotations"][0].update(change)
    where = 2 if case == "duplicate id" else change.get("id", 1)
    with pytest.raises(DatasetError) as caught:
        load(content, write_coco)
    assert len(caught.value.problems) == caught.value.total == 1
    line = str(caught.value)
    assert "\n" not in line
    assert f"data.json: annotation {where}: {field}: " in line
    assert what in line.split(field, 1)[1]


@pytest.mark.faults(24, fast=True)
@pytest.mark.parametrize("key", ["id", "image_id", "category_id", "bbox"])
def test_missing_keys(key, write_coco):
    content = coco()
    del content["annotations"][0][key]
    with pytest.raises(DatasetError, match=f"data.json: annotation .*: {key}: .*missing"):
        load(content, write_coco)


IMAGE_DEFECTS = {
    "no height": (lambda i: i.pop("height"), "height"),
    "zero width": (lambda i: i.update(width=0), "width"),
    "width as text": (lambda i: i.update(width="30"), "width"),
    "half a pixel": (lambda i: i.update(width=30.5), "width"),
    "NaN height": (lambda i: i.update(height=NAN), "height"),
    "no id": (lambda i: i.pop("id"), "id"),
    "id used twice": (lambda i: i.update(id=3), "id"),
    "no file": (lambda i: i.pop("file_name"), "file_name"),
    "file is a number": (lambda i: i.update(file_name=5), "file_name"),
    "file is empty": (lambda i: i.update(file_name=""), "file_name"),
    "absolute": (lambda i: i.update(file_name="/etc/passwd"), "file_name"),
    "parent": (lambda i: i.update(file_name="../../secret.jpg"), "file_name"),
    "hidden parent": (lambda i: i.update(file_name="a/../../images2/x.jpg"), "file_name"),
    "URL": (lambda i: i.update(file_name="http://example.org/a.jpg"), "file_name"),
    "file URL": (lambda i: i.update(file_name="file:///etc/passwd"), "file_name"),
    "zero byte": (lambda i: i.update(file_name="a\0.jpg"), "file_name"),
}


@pytest.mark.faults(24, 28, fast=True)
@pytest.mark.parametrize("case", IMAGE_DEFECTS)
def test_image_defect(case, write_coco):
    change, field = IMAGE_DEFECTS[case]
    content = coco()
    change(content["images"][0])
    with pytest.raises(DatasetError, match=rf"data\.json: image .*: {field}: "):
        load(content, write_coco, strict=False)


def test_names_that_stay_inside(write_coco, tmp_path):
    content = coco()
    content["images"][0]["file_name"] = str(tmp_path / "x.jpg")
    content["images"][1]["file_name"] = "sub/../y..z.jpg"
    records = load(content, write_coco, root=str(tmp_path))
    assert records[1]["file_name"] == str(tmp_path / "x.jpg")


FILES = {
    "empty": (b"", ":1:1: not valid JSON"),
    "truncated": (b'{"images": [\n {"id": 1,', ":2:"),
    "html": (b"<html></html>", "not valid JSON"),
    "binary": (b"\xff\xfe\x00\x01", "UTF-8"),
    "deep": (b"[" * 100_000, "nested too deeply|not valid JSON"),
    "list": (b"[1, 2]", "expected an object"),
    "no images": (b'{"annotations": [], "categories": []}', "top level: images"),
    "images is a dict": (b'{"images": {}}', "top level: images"),
    "annotations is text": (b'{"images": [], "annotations": "x"}', "top level: annotations"),
    "no categories": (b'{"images": [], "annotations": [{"id": 1}]}', "top level: categories"),
    "image is a number": (b'{"images": [5]}', "image 0: entry"),
    "annotation is null": (
        b'{"images": [], "categories": [], "annotations": [null]}',
        "annotation number 0: entry",
    ),
    "category without name": (b'{"images": [], "categories": [{"id": 1}]}', "category 1: name"),
}


@pytest.mark.faults(24, fast=True)
@pytest.mark.parametrize("case", FILES)
def test_file_defect(case, tmp_path):
    raw, message = FILES[case]
    path = tmp_path / "bad.json"
    path.write_bytes(raw)
    with pytest.raises(DatasetError, match=message) as caught:
        load_coco_json(path, "")
    assert "bad.json" in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        load_coco_json(tmp_path / "none.json", "")


def test_many_problems_are_collected_and_bounded(write_coco):
    content = coco()
    sound = content["annotations"][0]
    content["annotations"] = [{**sound, "id": i, "bbox": [1, 2, -1, 3]} for i in range(500)]
    with pytest.raises(DatasetError) as caught:
        load(content, write_coco)
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("500 problems")
    assert lines[-1] == "... and 480 more"
    assert caught.value.total == 500
    assert all("data.json: annotation" in line for line in lines[1:-1])


def test_not_strict_leaves_out_and_says_so(write_coco, caplog):
    content = coco()
    content["annotations"][0]["bbox"] = [1, 2, -1, 3]
    with caplog.at_level(logging.WARNING):
        records = load(content, write_coco, strict=False)
    assert sum(len(r["annotations"]) for r in records) == 2
    assert "annotation 1: bbox" in caplog.text


def test_minival_may_repeat_ids(write_coco):
    content = coco()
    content["annotations"][1]["id"] = 1
    path = write_coco(content, "instances_minival2014.json")
    assert len(load_coco_json(path, "")) == 2


def test_every_accepted_mask_decodes(write_coco):
    for record in load(None, write_coco):
        for annotation in record["annotations"]:
            if isinstance(annotation["segmentation"], dict):
                mask = mask_util.decode(annotation["segmentation"])
                assert mask.shape == (record["height"], record["width"])


def test_speed_of_a_large_file(write_coco, tmp_path):
    content = coco()
    sound = content["annotations"][0]
    content["annotations"] = [{**sound, "id": i} for i in range(20_000)]
    path = tmp_path / "large.json"
    path.write_text(json.dumps(content))
    begin = time.process_time()
    load_coco_json(path, "")
    assert time.process_time() - begin < 2  # about 0.1 s of one core
