"""A dataset of one's own, registered by the config: train, evaluate, predict, ship the model."""

import json
import sys

import cv2
import numpy as np
import pytest
import yaml

import d2kit
from d2kit.config import get_cfg
from d2kit.data import DatasetCatalog, MetadataCatalog
from d2kit.engine import DefaultPredictor, default_argument_parser
from d2kit.engine.resolve import build_named_cfg
from d2kit.predict.predictor import build_class_names
from tests.tools.test_scripts import TINY, _script

NAMES = ["zz_own_train", "zz_own_test"]


def _forget():
    for name in NAMES:
        DatasetCatalog.data.pop(name, None)
        MetadataCatalog.data.pop(name, None)


def _write_dataset(folder):
    (folder / "photos").mkdir()
    images, annotations = [], []
    for i in range(1, 5):
        cv2.imwrite(str(folder / f"photos/{i}.png"), np.full((48, 64, 3), 20 * i, np.uint8))
        images.append({"id": i, "file_name": f"{i}.png", "height": 48, "width": 64})
        box = {"bbox": [8, 8, 20, 20], "area": 400, "segmentation": [[8, 8, 28, 8, 28, 28, 8, 28]]}
        annotations.append(
            {"id": i, "image_id": i, "category_id": 3 + 4 * (i % 2), "iscrowd": 0, **box}
        )
    categories = [{"id": 7, "name": "mug"}, {"id": 3, "name": "jar"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "own.json").write_text(json.dumps(content))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The current folder, with a dataset and a config of its own."""
    monkeypatch.chdir(tmp_path)
    _write_dataset(tmp_path)
    datasets = {
        "REGISTER_COCO": [[name, "own.json", "photos"] for name in NAMES],
        "TRAIN": NAMES[:1],
        "TEST": NAMES[1:],
    }
    own = {**TINY, "DATASETS": datasets, "OUTPUT_DIR": "run"}
    own["_BASE_"] = "OwnData/mask_rcnn_R_18_FPN_scratch.yaml"
    own["MODEL"] = {**TINY["MODEL"], "ROI_HEADS": {"NUM_CLASSES": 2, "BATCH_SIZE_PER_IMAGE": 16}}
    own["SOLVER"] = {**TINY["SOLVER"], "MAX_EPOCHS": 1}
    own["DATALOADER"] = {"NUM_WORKERS": 1}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    _forget()
    yield tmp_path
    _forget()


def _train(config, *extra):
    arguments = ["--config-file", config, *extra]
    return _script("train_net").main(default_argument_parser().parse_args(arguments))


@pytest.mark.slow
def test_from_a_json_file_to_an_ap_and_to_another_machine(place, monkeypatch, capsys):
    first = _train("own.yaml")
    assert {"bbox", "segm"} <= set(first)
    written = yaml.safe_load((place / "run/config.yaml").read_text())
    assert written["DATASETS"]["REGISTER_COCO"] == [[n, "own.json", "photos"] for n in NAMES]
    assert written["MODEL"]["CLASS_NAMES"] == ["jar", "mug"], "by their ids, 3 and 7"
    _forget()
    again = _train("run/config.yaml", "--eval-only", "--resume")
    assert json.dumps(again) == json.dumps(first)
    _forget()
    resumed = _train("own.yaml", "--resume", "SOLVER.MAX_EPOCHS", "1.5")
    assert {"bbox", "segm"} <= set(resumed), "the names in the checkpoint are no change"

    _forget()
    (place / "own.json").unlink()
    weights = str(place / "run/model_final.pth")
    model = d2kit.init_detector("run/config.yaml", weights, device="cpu")
    assert model.class_names == model.metadata.thing_classes == ["jar", "mug"]
    cfg = get_cfg()
    cfg.merge_from_file("run/config.yaml")
    cfg.MODEL.WEIGHTS = weights
    assert DefaultPredictor(cfg).metadata.thing_classes == ["jar", "mug"]
    assert MetadataCatalog.get(NAMES[1]).get("thing_classes") is None, "the catalog stays as it is"
    arguments = ["--config-file", "run/config.yaml", "--input", "photos", "--output", "found"]
    arguments += ["--confidence-threshold", "0", "MODEL.WEIGHTS", weights]
    monkeypatch.setattr(sys, "argv", ["predict.py", *arguments])
    _script("predict").main()
    found = json.loads((place / "found/predictions.json").read_text())
    assert [c["name"] for c in found["categories"]] == ["jar", "mug"]
    assert len(found["images"]) == 4


def test_look_at_the_data(place, monkeypatch, capsys):
    page = ["--config-file", "own.yaml", "--source", "annotation", "--html", "look.html"]
    monkeypatch.setattr(sys, "argv", ["visualize_data.py", *page])
    _script("visualize_data").main()
    assert "mug" in (place / "look.html").read_text()
    (place / "results.json").write_text("[]")
    words = ["--input", "results.json", "--output", "beside", "--config-file", "own.yaml"]
    monkeypatch.setattr(sys, "argv", ["visualize_json_results.py", *words])
    _script("visualize_json_results").main()
    assert len(list((place / "beside").iterdir())) == 4


def test_names_of_the_classes(place):
    cfg = get_cfg()
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    assert build_class_names(cfg) == ["0", "1"]
    cfg.DATASETS.TRAIN = tuple(NAMES[:1])
    cfg.DATASETS.REGISTER_COCO = [[NAMES[0], "nowhere.json", "photos"]]
    assert build_class_names(cfg) == ["0", "1"], "annotations that are not there"
    _forget()
    cfg.DATASETS.REGISTER_COCO = [[NAMES[0], "own.json", "photos"]]
    assert build_class_names(cfg) == ["jar", "mug"], "from the annotations"
    assert build_named_cfg(cfg).MODEL.CLASS_NAMES == ["jar", "mug"]
    cfg.MODEL.CLASS_NAMES = ["mug", "jar"]
    assert build_class_names(cfg) == ["mug", "jar"]
    with pytest.raises(ValueError, match=r"MODEL\.CLASS_NAMES is \[mug, jar\].*\[jar, mug\]"):
        build_named_cfg(cfg)
