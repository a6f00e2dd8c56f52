import json
import logging

import numpy as np
import pytest
from pycocotools import mask as mask_util

from d2kit.config import get_cfg
from d2kit.data import DatasetCatalog, MetadataCatalog, register_dataset
from d2kit.data.catalog import (
    CITYSCAPES_CATEGORIES,
    COCO_CATEGORIES,
    _get_builtin_metadata,
    _get_coco_instances_meta,
)
from d2kit.data.datasets import (
    builtin,
    convert_to_coco_dict,
    convert_to_coco_json,
    load_coco_json,
    load_sem_seg,
    register_coco_instances,
)
from d2kit.data.datasets.coco import prefer_class_order
from d2kit.engine.resolve import register_listed_datasets
from d2kit.structures import BoxMode
from d2kit.structures.masks import decode_counts
from tests.data.conftest import coco


def test_load(write_coco, names):
    name = names()
    records = load_coco_json(write_coco(), "images", name)
    assert [r["image_id"] for r in records] == [3, 7]
    assert records[1] == {
        "file_name": "images/b.jpg",
        "height": 20,
        "width": 30,
        "image_id": 7,
        "annotations": records[1]["annotations"],
    }
    polygon, runs = records[1]["annotations"]
    assert polygon == {
        "iscrowd": 0,
        "bbox": [1, 2, 10, 8],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": 1,
        "segmentation": [[1, 2, 11, 2, 11, 10, 1, 10]],
    }
    assert runs["category_id"] == 0
    assert mask_util.decode(runs["segmentation"])[:, :2].all()
    assert mask_util.area(runs["segmentation"]) == 40
    crowd = records[0]["annotations"][0]
    assert crowd["iscrowd"] == 1
    assert crowd["segmentation"] == {"size": [40, 20], "counts": "0Pi0"}
    metadata = MetadataCatalog.get(name)
    assert metadata.thing_classes == ["dog", "cat"]
    assert metadata.thing_dataset_id_to_contiguous_id == {2: 0, 5: 1}


def test_load_without_name_keeps_ids_and_extra_keys(write_coco):
    content = coco()
    content["annotations"][0]["track"] = 9
    records = load_coco_json(write_coco(content), "", extra_annotation_keys=["track"])
    assert records[1]["annotations"][0]["category_id"] == 5
    assert records[1]["annotations"][0]["track"] == 9
    assert "track" not in records[1]["annotations"][1]


def test_keypoints_become_continuous(write_coco):
    content = coco()
    content["annotations"][0]["keypoints"] = [1, 2, 2, 0, 0, 0]
    records = load_coco_json(write_coco(content), "")
    assert records[1]["annotations"][0]["keypoints"] == [1.5, 2.5, 2, 0.5, 0.5, 0]


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.pop("segmentation"),
        lambda a: a.update(segmentation=[]),
        lambda a: a.update(segmentation=None),
        lambda a: a.pop("iscrowd"),
        lambda a: a.pop("area"),
        lambda a: a.update(ignore=0),
        lambda a: a.update(bbox=[3, 4, 0, 0]),
        lambda a: a.update(score=float("nan"), note="extra"),
        lambda a: a.update(bbox=[0.5, 1e-3, 2.5, 3.25]),
    ],
)
def test_tolerated(write_coco, change):
    content = coco()
    change(content["annotations"][0])
    assert len(load_coco_json(write_coco(content), "")[1]["annotations"]) == 2


def test_tolerated_files(write_coco):
    test_images = {k: v for k, v in coco().items() if k != "annotations"}
    assert all(r["annotations"] == [] for r in load_coco_json(write_coco(test_images), ""))
    boxes = coco()
    for annotation in boxes["annotations"]:
        del annotation["segmentation"]
    assert load_coco_json(write_coco(boxes), "")[0]["annotations"][0]["iscrowd"] == 1
    floats = coco()
    floats["images"][0]["height"] = 20.0
    assert type(load_coco_json(write_coco(floats), "")[1]["height"]) is int
    path = write_coco()
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(load_coco_json(path, "")) == 2


def test_box_beyond_the_image_is_said(write_coco, caplog):
    content = coco()
    content["annotations"][0]["bbox"] = [-5, 2, 10, 8]
    with caplog.at_level(logging.WARNING):
        load_coco_json(write_coco(content), "")
    assert "annotation 1: bbox: [-5, 2, 10, 8]" in caplog.text


@pytest.mark.parametrize("seed", range(5))
def test_decode_counts_equals_pycocotools(seed):
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 200, 2))
    mask = np.asfortranarray(rng.random(shape) < (0.5, 0.01, 0.99, 0.0, 1.0)[seed], dtype=np.uint8)
    runs = decode_counts(mask_util.encode(mask)["counts"])
    flat = np.concatenate([[0], mask.reshape(-1, order="F"), [2]]).astype(np.int64)
    want = np.diff(np.flatnonzero(np.concatenate([np.diff(flat) != 0])), prepend=0)
    if runs[0] == 0:
        assert mask[0, 0] == 1
        runs = runs[1:]
        want = want[want > 0]
    assert runs.tolist() == want.tolist()


def test_register_twice(write_coco, names):
    name = names()
    path = write_coco()
    register_coco_instances(name, {"x": 1}, path, "images")
    register_coco_instances(name, {"x": 1}, str(path), "images")
    metadata = MetadataCatalog.get(name)
    assert (metadata.json_file, metadata.image_root) == (str(path), "images")
    assert (metadata.evaluator_type, metadata.x) == ("coco", 1)
    for arguments in [({"x": 1}, path, "other"), ({"x": 2}, path, "images"), ({}, "b", "images")]:
        with pytest.raises(ValueError, match=f"'{name}' is already registered"):
            register_coco_instances(name, *arguments)
    assert len(DatasetCatalog.get(name)) == 2
    assert len(DatasetCatalog.get(name)) == 2


def test_register_dataset(write_coco, names):
    name = names()
    register_dataset(name, json=write_coco(), images="images")
    assert DatasetCatalog.get(name)[0]["file_name"] == "images/a.jpg"


def test_registering_with_conflicting_metadata_leaves_nothing(write_coco, names):
    name = names()
    MetadataCatalog.get(name).evaluator_type = "lvis"
    with pytest.raises(ValueError, match="evaluator_type"):
        register_coco_instances(name, {}, write_coco(), "images")
    assert name not in DatasetCatalog


def test_class_names_that_differ_from_the_file(write_coco, names):
    name = names()
    register_coco_instances(name, {"thing_classes": ["cat", "cow"]}, write_coco(), "images")
    with pytest.raises(ValueError, match="thing_classes"):
        DatasetCatalog.get(name)


def test_keypoints_of_null_are_none(write_coco):
    content = coco()
    content["annotations"][0]["keypoints"] = None
    records = load_coco_json(write_coco(content), "images")
    assert not any("keypoints" in a for r in records for a in r["annotations"])


@pytest.mark.parametrize(
    "arguments",
    [(1, {}, "a", "b"), ("n", None, "a", "b"), ("n", {}, None, "b"), ("", {}, "a", "b")],
)
def test_register_with_wrong_types(arguments):
    with pytest.raises(TypeError):
        register_coco_instances(*arguments)


def test_convert_round_trip(write_coco, names, tmp_path):
    source, copy = names(), names()
    content = coco()
    content["annotations"][0]["keypoints"] = [1, 2, 2, 0, 0, 0]
    register_coco_instances(source, {}, write_coco(content), "images")
    out = tmp_path / "deep" / "copy.json"
    convert_to_coco_json(source, out)
    register_coco_instances(copy, {}, out, "")
    records, again = DatasetCatalog.get(source), DatasetCatalog.get(copy)
    for a, b in zip(records, again, strict=True):
        assert a["image_id"] == b["image_id"]
        assert len(a["annotations"]) == len(b["annotations"])
        for x, y in zip(a["annotations"], b["annotations"], strict=True):
            assert x["category_id"] == y["category_id"]
            assert x["bbox"] == y["bbox"]
            assert x.get("keypoints") == y.get("keypoints")
    written = json.loads(out.read_text())["annotations"]
    assert {a["category_id"] for a in written} == {2, 5}
    assert sorted(a["area"] for a in written) == [40, 80, 800]
    assert [a["num_keypoints"] for a in written if "keypoints" in a] == [1]
    assert len({a["id"] for a in written}) == 3


def test_convert_own_records(names):
    name = names()
    mask = np.zeros((10, 12), dtype=bool)
    mask[2:5, 3:7] = True
    annotations = [
        {"bbox": [1, 2, 4, 8], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0},
        {"bbox": [5, 5, 4, 2, 90], "bbox_mode": BoxMode.XYWHA_ABS, "category_id": 1},
        {"bbox": [3, 2, 4, 3], "category_id": 1, "segmentation": mask},
        {"bbox": [0, 0, 4, 3], "category_id": 1, "segmentation": [[0, 0, 4, 0, 0, 3]]},
    ]
    record = {"file_name": "x.png", "width": 12, "height": 10, "annotations": annotations}
    DatasetCatalog.register(name, lambda: [record])
    MetadataCatalog.get(name).thing_classes = ["a", "b"]
    got = convert_to_coco_dict(name)
    assert [c["id"] for c in got["categories"]] == [0, 1]
    assert [a["bbox"] for a in got["annotations"]][:2] == [[1, 2, 3, 6], [5, 5, 4, 2, 90]]
    assert [a["area"] for a in got["annotations"]] == [18, 8, 12, 6]
    assert np.array_equal(mask_util.decode(got["annotations"][2]["segmentation"]), mask)
    json.dumps(got)


def test_convert_keeps_cached_file_and_fails_cleanly(names, tmp_path):
    name = names()
    records = [{"file_name": "x", "width": 1, "height": 1, "annotations": [{"category_id": 0}]}]
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).thing_classes = ["a"]
    out = tmp_path / "c.json"
    with pytest.raises(ValueError, match="no 'bbox'"):
        convert_to_coco_json(name, out)
    assert list(tmp_path.iterdir()) == []
    out.write_text("cached")
    convert_to_coco_json(name, out)
    assert out.read_text() == "cached"
    records[0]["annotations"] = []
    convert_to_coco_json(name, out, allow_cached=False)
    assert json.loads(out.read_text())["images"][0]["width"] == 1


def test_a_converted_file_is_made_anew_when_the_dataset_has_changed(names, tmp_path):
    """Its digest is that of the records; a file of others is never written over."""
    name = names()
    box = {"bbox": [0, 0, 2, 2], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    records = [{"file_name": "x", "width": 9, "height": 9, "annotations": [box]}]
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).thing_classes = ["a"]
    out = tmp_path / "c.json"

    def written():
        convert_to_coco_json(name, out)
        return json.loads(out.read_text()), out.stat().st_mtime_ns

    first = written()
    assert written() == first
    for change in (
        lambda: box.update(bbox=[0, 0, 3, 2]),
        lambda: records[0].update(file_name="y"),
        lambda: records[0]["annotations"].append(dict(box)),
    ):
        before, time = written()
        change()
        after, later = written()
        assert later > time
        assert after["info"]["digest"] != before["info"]["digest"]
    assert len(written()[0]["annotations"]) == 2
    MetadataCatalog.get(name).__dict__["thing_classes"] = ["b"]
    assert written()[0]["categories"][0]["name"] == "b"
    of_others = json.dumps({"info": {"description": "mine"}, "images": []})
    out.write_text(of_others)
    convert_to_coco_json(name, out)
    assert out.read_text() == of_others


def test_classes_of_another_order_are_mapped_by_name(write_coco, names):
    """The file has dog 2, cat 5; a model that has cat, dog gets them in its order."""
    plain, mapped, other = names(), names(), names()
    for name in (plain, mapped, other):
        register_coco_instances(name, {}, write_coco(), "images")
    prefer_class_order(mapped, ["cat", "dog"])
    prefer_class_order(other, ["cat", "cow"])

    def boxes(name):
        found = DatasetCatalog.get(name)
        classes = MetadataCatalog.get(name).thing_classes
        return classes, sorted(
            (classes[a["category_id"]], a["bbox"]) for r in found for a in r["annotations"]
        )

    assert boxes(plain)[0] == ["dog", "cat"]
    assert boxes(mapped) == (["cat", "dog"], boxes(plain)[1])
    assert MetadataCatalog.get(mapped).thing_dataset_id_to_contiguous_id == {5: 0, 2: 1}
    assert boxes(other)[0] == ["dog", "cat"], "other names: nothing is mapped"
    prefer_class_order(plain, ["cat", "dog"])
    assert boxes(plain)[0] == ["dog", "cat"], "its records may be in use"


def test_sem_seg(tmp_path, caplog):
    for path in ("im/a/1.jpg", "im/2.jpg", "im/3.jpg", "gt/a/1.png", "gt/2.png", "gt/9.png"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    got = load_sem_seg(str(tmp_path / "gt"), str(tmp_path / "im"))
    assert [r["file_name"].rsplit("im/")[-1] for r in got] == ["2.jpg", "a/1.jpg"]
    assert [r["sem_seg_file_name"].rsplit("gt/")[-1] for r in got] == ["2.png", "a/1.png"]
    assert "left out 2 files" in caplog.text
    with pytest.raises(FileNotFoundError):
        load_sem_seg(str(tmp_path / "none"), str(tmp_path / "im"))
    with pytest.raises(ValueError, match="same name"):
        load_sem_seg(str(tmp_path / "gt"), str(tmp_path / "im"), image_ext="bmp")


def test_coco_facts():
    things = [c for c in COCO_CATEGORIES if c["isthing"]]
    assert (len(things), len(COCO_CATEGORIES), len(CITYSCAPES_CATEGORIES)) == (80, 133, 19)
    assert len({c["id"] for c in COCO_CATEGORIES}) == 133
    assert len({tuple(c["color"]) for c in COCO_CATEGORIES}) == 133
    meta = _get_coco_instances_meta()
    ids = meta["thing_dataset_id_to_contiguous_id"]
    assert (ids[1], ids[90]) == (0, 79)
    assert meta["thing_classes"][0] == "person"
    person = _get_builtin_metadata("coco_person")
    known = set(person["keypoint_names"])
    assert len(known) == 17
    assert len(person["keypoint_flip_map"]) == 8
    assert {x for pair in person["keypoint_flip_map"] for x in pair} <= known
    assert {x for a, b, _ in person["keypoint_connection_rules"] for x in (a, b)} == known
    with pytest.raises(KeyError, match="coco_person"):
        _get_builtin_metadata("coco_persn")


@pytest.mark.parametrize(
    ("name", "json_file", "folder"),
    [
        ("coco_2014_minival", "instances_minival2014.json", "val2014"),
        ("coco_2017_val_100", "instances_val2017_100.json", "val2017"),
        ("coco_2017_test-dev", "image_info_test-dev2017.json", "test2017"),
        ("keypoints_coco_2017_train", "person_keypoints_train2017.json", "train2017"),
    ],
)
def test_builtin_paths(name, json_file, folder, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", "/elsewhere")
    monkeypatch.setenv("D2KIT_DATASETS", "/data")
    seen = []
    monkeypatch.setattr(builtin, "register_coco_instances", lambda *a: seen.append(a))
    builtin.register_builtin(name)
    assert seen[0][2:] == (f"/data/coco/annotations/{json_file}", f"/data/coco/{folder}")


def test_dataset_root(monkeypatch):
    monkeypatch.delenv("D2KIT_DATASETS", raising=False)
    monkeypatch.setenv("DETECTRON2_DATASETS", "/elsewhere")
    assert builtin.dataset_root() == "/elsewhere"
    monkeypatch.delenv("DETECTRON2_DATASETS")
    assert builtin.dataset_root() == "datasets"


@pytest.fixture
def with_defects(write_coco):
    content = coco()
    triangle = [1.0, 1, 8, 1, 8, 8]
    content["annotations"][0].update(segmentation=[triangle, [1.0, 1, 2, 2]])
    content["annotations"].append({**content["annotations"][0], "id": 91, "segmentation": [[3, 3]]})
    content["annotations"].append({**content["annotations"][0], "id": 92, "category_id": 77})
    return write_coco(content)


def test_defects_are_an_error_or_left_out_and_counted(with_defects, caplog):
    with pytest.raises(ValueError, match="annotation 91"):
        load_coco_json(with_defects, "")
    records = load_coco_json(with_defects, "", strict=False)
    assert len(records[1]["annotations"]) == 2
    assert records[1]["annotations"][0]["segmentation"] == [[1, 1, 8, 1, 8, 8]]
    assert "left out 3 polygons without three points, and 1 annotations" in caplog.text
    assert "annotation 92" in caplog.text


def test_the_key_of_the_config_chooses(with_defects, tmp_path):
    cfg = get_cfg()
    cfg.DATASETS.REGISTER_COCO = [["with_defects", str(with_defects), str(tmp_path)]]
    cfg.DATASETS.STRICT_ANNOTATIONS = False
    register_listed_datasets(cfg, ["with_defects"])
    try:
        assert len(DatasetCatalog.get("with_defects")) == 2
    finally:
        register_listed_datasets(get_cfg(), [])
    with pytest.raises(ValueError, match="annotation 91"):
        DatasetCatalog.get("with_defects")
    DatasetCatalog.remove("with_defects")
