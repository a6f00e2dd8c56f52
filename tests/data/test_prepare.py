import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d2kit.data import DatasetError
from d2kit.data.datasets import load_sem_seg
from d2kit.data.datasets.coco_panoptic import write_ade20k_labels, write_stuff_labels

FOLDER = Path(__file__).parents[2] / "datasets"
STUFF, THINGS = {92: 1, 200: 53, 0: 0}, [1, 18]


@pytest.fixture
def coco(tmp_path, monkeypatch):
    """A panoptic split with one image: nothing, a banner, a person with a large id, a rug."""
    monkeypatch.setenv("D2KIT_DATASETS", str(tmp_path))
    ids = np.repeat([[0, 5, 70_000, 256**3 - 1]], 3, axis=0)
    rgb = np.stack([ids % 256, ids // 256 % 256, ids // 256**2], axis=-1).astype(np.uint8)
    folder = tmp_path / "coco/panoptic_val2017"
    folder.mkdir(parents=True)
    Image.fromarray(rgb).save(folder / "a.png")
    segments = [{"id": i, "category_id": c} for i, c in ((70_000, 1), (5, 92), (256**3 - 1, 200))]
    entry = {"image_id": 1, "file_name": "a.png", "segments_info": segments}
    (tmp_path / "coco/annotations").mkdir()
    write_json(tmp_path, entry)
    return tmp_path, entry


def write_json(root, entry):
    path = root / "coco/annotations/panoptic_val2017.json"
    path.write_text(json.dumps({"annotations": [entry]}))
    return str(path)


def run_script(monkeypatch, name, *arguments):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    module.main()


def test_script_of_panoptic_labels(coco, monkeypatch, capsys):
    root, _ = coco
    run_script(monkeypatch, "prepare_panoptic_fpn", "val2017")
    assert "1 label images" in capsys.readouterr().out
    labels = np.asarray(Image.open(root / "coco/panoptic_stuff_val2017/a.png"))
    np.testing.assert_array_equal(labels, np.repeat([[255, 1, 0, 53]], 3, axis=0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segments_info": [{"id": 5, "category_id": 92}]}, r"a\.png: segment 70000 is not in"),
        ({"segments_info": [{"id": 5, "category_id": 77}]}, "image 1: category_id: 77 is no"),
        ({"file_name": "../a.png"}, "image 1: file_name"),
    ],
)
def test_damaged_panoptic_annotations(coco, change, message):
    root, entry = coco
    path = write_json(root, {**entry, **change})
    with pytest.raises(DatasetError, match=message):
        write_stuff_labels(
            path, str(root / "coco/panoptic_val2017"), str(root / "o"), STUFF, THINGS
        )
    assert not list(root.glob("o/*"))


def test_script_of_ade20k(tmp_path, monkeypatch):
    monkeypatch.setenv("D2KIT_DATASETS", str(tmp_path))
    root = tmp_path / "ADEChallengeData2016"
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        Image.new("RGB", (2, 2)).save(root / "images" / split / "a.jpg")
        labels = np.array([[0, 1], [150, 2]], np.uint8)
        Image.fromarray(labels).save(root / "annotations" / split / "a.png")
    run_script(monkeypatch, "prepare_ade20k_sem_seg")
    new = root / "annotations_detectron2/validation"
    np.testing.assert_array_equal(np.asarray(Image.open(new / "a.png")), [[255, 0], [149, 1]])
    assert len(load_sem_seg(str(new), str(root / "images/validation"))) == 1


def test_wrong_ade20k(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no \*\.png"):
        write_ade20k_labels(str(tmp_path), str(tmp_path / "o"))
    Image.fromarray(np.full((2, 2), 151, np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(DatasetError, match=r"a\.png: label 151, expected 0 to 150"):
        write_ade20k_labels(str(tmp_path), str(tmp_path / "o"))
