import copy
import importlib
import json

import pytest

from d2kit.data import DatasetCatalog, DatasetError, MetadataCatalog
from d2kit.data.datasets import get_lvis_instances_meta, load_lvis_json, register_lvis_instances
from d2kit.data.datasets import lvis_v1_categories as lvis_v1_category_image_count
from d2kit.data.datasets.lvis import read_categories

BASE = {
    "info": {"description": 'has "categories": in it'},
    "images": [
        {
            "id": 9,
            "height": 20,
            "width": 30,
            "coco_url": "http://images.cocodataset.org/train2017/000000000009.jpg",
            "neg_category_ids": [3],
            "not_exhaustive_category_ids": [1],
        },
        {"id": 2, "height": 20, "width": 30, "file_name": "val2017/2.jpg"},
    ],
    "annotations": [
        {
            "id": 1,
            "image_id": 9,
            "category_id": 3,
            "bbox": [1.0, 2.0, 5.0, 6.0],
            "area": 30.0,
            "segmentation": [[1.0, 2.0, 6.0, 2.0, 6.0, 8.0, 1.0, 8.0]],
        }
    ],
    "categories": [
        {
            "id": i,
            "name": name,
            "synonyms": [name, "other"],
            "frequency": "c",
            "image_count": 10 * i,
            "def": "größe",
        }
        for i, name in ((3, "zebra"), (1, "aerosol_can"), (2, "bagel"))
    ],
}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder of public datasets with LVIS v1's training set."""
    monkeypatch.setenv("D2KIT_DATASETS", str(tmp_path))
    (tmp_path / "lvis").mkdir()
    (tmp_path / "lvis/lvis_v1_train.json").write_text(json.dumps(BASE, ensure_ascii=False), "utf-8")
    read_categories.cache_clear()
    return tmp_path


@pytest.fixture
def name():
    yield "zz_lvis"
    for table in (DatasetCatalog, MetadataCatalog):
        table.data.pop("zz_lvis", None)


def test_load(root, name):
    path = str(root / "lvis/lvis_v1_train.json")
    register_lvis_instances(name, {"note": 1}, path, "coco")
    first, second = DatasetCatalog.get(name)
    assert (first["file_name"], second["file_name"]) == (
        "coco/val2017/2.jpg",
        "coco/train2017/000000000009.jpg",
    )
    assert second["neg_category_ids"] == [3]
    assert second["not_exhaustive_category_ids"] == [1]
    assert first["neg_category_ids"] == []
    assert second["annotations"][0]["category_id"] == 2
    metadata = MetadataCatalog.get(name)
    assert metadata.thing_classes == ["aerosol_can", "bagel", "zebra"]
    assert metadata.class_image_count[0] == {"id": 1, "image_count": 10}
    assert metadata.evaluator_type == "lvis"
    raw = load_lvis_json(path, "coco", extra_annotation_keys=["area"])
    assert raw[1]["annotations"][0]["category_id"] == 3
    assert raw[1]["annotations"][0]["area"] == 30.0


def test_metadata_come_from_the_annotation_file(root):
    meta = get_lvis_instances_meta("lvis_v1_train")
    assert meta["thing_classes"] == ["aerosol_can", "bagel", "zebra"]
    assert [c["image_count"] for c in meta["class_image_count"]]
    assert len(get_lvis_instances_meta("lvis_v1_val_cocofied")["thing_classes"]) == 80


@pytest.mark.parametrize(("module", "count"), [("v1", 1203), ("v0_5", 1230)])
def test_categories_without_any_file(tmp_path, monkeypatch, module, count):
    """What GTR, VLPart and other projects import at their top."""
    monkeypatch.setenv("D2KIT_DATASETS", str(tmp_path))
    found = importlib.import_module(f"d2kit.data.datasets.lvis_{module}_categories").LVIS_CATEGORIES
    assert [c["id"] for c in found] == list(range(1, count + 1))
    assert all(c["synonyms"] and c["frequency"] in "rcf" for c in found)
    meta = get_lvis_instances_meta(f"lvis_{module.replace('_', '.')}_val")
    assert meta["thing_classes"] == [c["synonyms"][0] for c in found]
    assert ("class_image_count" in meta) == (module == "v1")


def test_counts_of_images_without_any_file():
    counts = lvis_v1_category_image_count.LVIS_CATEGORY_IMAGE_COUNT
    assert len(counts) == 1203
    assert counts[0] == {"id": 1, "image_count": 64}


def test_another_version_is_refused():
    with pytest.raises(ValueError, match="no dataset of LVIS"):
        get_lvis_instances_meta("mine")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no list of categories"),
        ('{"images": []}', "no list of categories"),
        ('{"categories": [{"id": 1', "no list of categories"),
        ('{"categories": [{"id": 1, "name": "a"}]}', "no frequency, image_count"),
        ('{"categories": [5]}', "no id, name"),
    ],
)
def test_damaged_categories(root, text, message):
    (root / "lvis/lvis_v1_train.json").write_text(text)
    read_categories.cache_clear()
    with pytest.raises(DatasetError, match=rf"lvis_v1_train\.json: categories: {message}"):
        get_lvis_instances_meta("lvis_v1_train")


def change(table, index, **fields):
    data = copy.deepcopy(BASE)
    data[table][index].update(fields)
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (change("images", 0, coco_url="x/../../../a/.."), "image 9: file_name.*outside"),
        (change("images", 1, file_name="/etc/passwd"), "image 2: file_name.*outside"),
        (change("images", 0, neg_category_ids="3"), "image 9: neg_category_ids"),
        (change("images", 0, not_exhaustive_category_ids=[1.5]), "image 9: not_exhaustive"),
        (change("annotations", 0, image_id=77), "annotation 1: image_id: 77 is not among"),
        (change("annotations", 0, bbox=[1, 2, -3, 4]), "annotation 1: bbox"),
        ({**BASE, "images": 5}, "images: expected a list"),
    ],
)
def test_defects_are_one_line(tmp_path, data, message):
    (tmp_path / "a.json").write_text(json.dumps(data))
    with pytest.raises(DatasetError, match=message) as caught:
        load_lvis_json(str(tmp_path / "a.json"), str(tmp_path / "coco"))
    assert str(tmp_path / "a.json") in str(caught.value)


def test_public_names_before_and_after_the_file_is_there(root, monkeypatch):
    from d2kit.data import catalog
    from d2kit.data.datasets.builtin import register_builtin

    for table in (DatasetCatalog, MetadataCatalog):
        monkeypatch.setattr(table, "data", {})
    monkeypatch.setattr(catalog, "_PENDING", {})
    register_builtin("lvis_v0.5_val")
    assert MetadataCatalog.get("lvis_v0.5_val").evaluator_type == "lvis"
    assert len(MetadataCatalog.get("lvis_v0.5_val").thing_classes) == 1230
    register_builtin("lvis_v1_train")
    assert len(MetadataCatalog.get("lvis_v1_train").thing_classes) == 3
    assert len(DatasetCatalog.get("lvis_v1_train")) == 2
