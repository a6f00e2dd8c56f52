"""DATASETS.REGISTER_COCO: datasets that a config registers."""

import pytest

from d2kit.config import get_cfg
from d2kit.data import (
    DatasetCatalog,
    MetadataCatalog,
    build_detection_test_loader,
    register_dataset,
    register_datasets,
)
from tests.data.conftest import coco


def test_a_loader_registers_what_its_config_lists(write_coco, names, tmp_path):
    name = names()
    for image in ("a.jpg", "b.jpg"):
        (tmp_path / image).touch()
    cfg = get_cfg()
    cfg.DATASETS.REGISTER_COCO = [[name, str(write_coco()), str(tmp_path)]]
    cfg.DATALOADER.NUM_WORKERS = 0
    assert len(build_detection_test_loader(cfg, name)) == 2
    assert MetadataCatalog.get(name).thing_classes == ["dog", "cat"]
    assert len(build_detection_test_loader(cfg, name)) == 2, "the same twice is no error"


def test_paths(write_coco, names, tmp_path, monkeypatch):
    """From the current folder, else from D2KIT_DATASETS; the same file by another path is equal."""
    name, other = names(), names()
    file = write_coco(name="mine.json")
    (tmp_path / "root").mkdir()
    (tmp_path / "work").mkdir()
    write_coco(coco(annotations=[]), name="root/there.json")
    monkeypatch.setenv("D2KIT_DATASETS", str(tmp_path / "root"))
    monkeypatch.chdir(tmp_path / "work")
    register_datasets([(name, "../mine.json", "../"), (other, "there.json", "images")])
    assert MetadataCatalog.get(name).json_file == "../mine.json"
    assert MetadataCatalog.get(other).json_file == str(tmp_path / "root/there.json")
    assert MetadataCatalog.get(other).image_root == "images"  # of a folder that is nowhere
    register_datasets([[name, str(file), str(tmp_path)]])
    assert [len(r["annotations"]) for r in DatasetCatalog.get(other)] == [0, 0]


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (["cats", "a.json", "images"], ["'cats'", "[name, annotations.json, folder of images]"]),
        ([["cats", "a.json"]], ["['cats', 'a.json']"]),
        ([["cats", 3, "images"]], ["three texts"]),
        ([["", "a.json", "images"]], ["three texts"]),
        ([["cats", "https://host/a.json", "images"]], ["https://host/a.json", "no local path"]),
        ([["coco_2017_val", "a.json", "images"]], ["already registered", "instances_val2017.json"]),
    ],
)
def test_mistakes(entries, words):
    with pytest.raises(ValueError, match=r"DATASETS\.REGISTER_COCO") as caught:
        register_datasets(entries)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "cats" not in DatasetCatalog


def test_a_name_with_other_files_is_an_error(write_coco, names, tmp_path):
    name, function = names(), names()
    register_dataset(name, write_coco(), tmp_path)
    with pytest.raises(ValueError, match=rf"'{name}' is already registered with .*data\.json"):
        register_datasets([[name, str(write_coco(name="other.json")), str(tmp_path)]])
    DatasetCatalog.register(function, list)
    with pytest.raises(ValueError, match="already registered otherwise"):
        register_datasets([[function, "a.json", "images"]])
