"""What is evaluated: trained weights, classes by name, a folder of results for each test set."""

import json
from types import SimpleNamespace

import pytest
import torch

from d2kit.cli.evaluate import evaluate_groups_main
from d2kit.data import DatasetCatalog, MetadataCatalog
from d2kit.data.datasets import register_coco_instances
from d2kit.engine.evaluate import DefaultEvaluation, check_evaluated_weights
from d2kit.evaluation import COCOEvaluator, inference_on_dataset
from d2kit.evaluation.evaluator import stale_results
from d2kit.evaluation.report import write_report
from d2kit.structures import Boxes, BoxMode, Instances
from tests.support.rcnn_data import CLASSES, write_dataset
from tests.support.tiny_model import tiny_config

NAMES = ("zz_evaluated_a", "zz_evaluated_b")


@pytest.mark.parametrize(
    ("lacking", "said"),
    [
        (None, r"no weights were loaded \(MODEL.WEIGHTS is empty"),
        (["head.weight"], r"1 weights of the model did not fit the file \(head.weight\)"),
        (["a", "b", "c", "d"], r"4 weights .* \(a, b, c, \.\.\.\)"),
    ],
)
def test_an_untrained_model_is_refused_unless_told(lacking, said, caplog):
    checkpointer = SimpleNamespace(not_loaded=lacking)
    with pytest.raises(ValueError, match=said) as error:
        check_evaluated_weights(checkpointer)
    assert "--allow-untrained" in str(error.value)
    caplog.set_level("WARNING", "d2kit.engine.evaluate")
    check_evaluated_weights(checkpointer, allow=True)


def test_a_checkpointer_tells_what_did_not_fit(tmp_path):
    from torch import nn

    from d2kit.checkpoint import DetectionCheckpointer

    def make(out):
        return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, out))

    torch.save({"model": make(2).state_dict()}, tmp_path / "w.pth")
    whole, part = (DetectionCheckpointer(make(out), str(tmp_path / "o")) for out in (2, 5))
    assert whole.not_loaded is None
    whole.resume_or_load(str(tmp_path / "w.pth"), resume=False)
    check_evaluated_weights(whole)
    part.resume_or_load(str(tmp_path / "w.pth"), resume=False)
    assert part.not_loaded == ["1.bias", "1.weight"]
    none = DetectionCheckpointer(make(2), str(tmp_path / "o"))
    none.resume_or_load("", resume=True)
    assert none.not_loaded is None


class Truth(torch.nn.Module):
    """Finds the objects of a dataset, with the classes of the model."""

    def __init__(self, records, classes):
        super().__init__()
        self.records = {r["file_name"]: r for r in records}
        self.classes = classes
        self.device = torch.device("cpu")

    def forward(self, batch):
        found = []
        for sample in batch:
            record = self.records[sample["file_name"]]
            boxes = [
                BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS)
                for a in record["annotations"]
            ]
            one = Instances((record["height"], record["width"]))
            one.pred_boxes = Boxes(torch.tensor(boxes))
            one.scores = torch.linspace(0.9, 0.8, len(boxes))
            one.pred_classes = torch.tensor([a["category_id"] for a in record["annotations"]])
            found.append({"instances": one})
        return found


@pytest.fixture
def sets(tmp_path):
    """Two test sets of the same objects; the second has its classes in another order."""
    (tmp_path / "images").mkdir()
    path = write_dataset(tmp_path / "images")
    content = json.loads(path.read_text())
    order = [CLASSES[2], CLASSES[0], CLASSES[1]]
    new = {i + 1: order.index(name) + 1 for i, name in enumerate(CLASSES)}
    content["categories"] = [{"id": i + 1, "name": name} for i, name in enumerate(order)]
    for a in content["annotations"]:
        a["category_id"] = new[a["category_id"]]
    for image in content["images"]:
        image["id"] += 50
    for a in content["annotations"]:
        a["image_id"] += 50
    other = tmp_path / "other.json"
    other.write_text(json.dumps(content))
    for name, file in zip(NAMES, (path, other), strict=True):
        register_coco_instances(name, {}, str(file), str(tmp_path / "images"))
    cfg = tiny_config()
    cfg.merge_from_list(
        ["DATASETS.TRAIN", NAMES[:1], "DATASETS.TEST", NAMES, "OUTPUT_DIR", str(tmp_path / "o")]
        + ["MODEL.MASK_ON", False, "MODEL.KEYPOINT_ON", False, "DATALOADER.NUM_WORKERS", 0]
        + ["MODEL.ROI_HEADS.NUM_CLASSES", 3]
    )
    yield cfg
    for name in NAMES:
        DatasetCatalog.data.pop(name, None)
        MetadataCatalog.data.pop(name, None)


def test_test_sets_are_mapped_by_name_and_have_a_folder_each(sets, tmp_path):
    model = Truth(DatasetCatalog.get(NAMES[0]), CLASSES)
    results = DefaultEvaluation.test(sets, model)
    assert [results[name]["bbox"]["AP"] for name in NAMES] == pytest.approx([100, 100])
    ids = {
        name: {
            row["image_id"]
            for file in (tmp_path / "o/inference" / name).glob("coco_instances_results.json")
            for row in json.loads(file.read_text())
        }
        for name in NAMES
    }
    assert ids == {NAMES[0]: {0, 1, 2, 3}, NAMES[1]: {50, 51, 52, 53}}


def test_a_test_set_with_other_classes_is_refused(sets, tmp_path):
    path = tmp_path / "other.json"
    content = json.loads(path.read_text())
    content["categories"][0]["name"] = "zebra"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"only here \[zebra\]"):
        DefaultEvaluation.test(sets, Truth(DatasetCatalog.get(NAMES[0]), CLASSES))


def test_names_that_are_alike_as_folders_stay_apart(sets):
    from d2kit.engine.evaluate import _build_folder

    folders = {_build_folder(sets, name) for name in ("a/b", "a_b", "a b", "../a_b")}
    assert len(folders) == 4
    assert all("/inference/" in f and ".." not in f for f in folders)


def test_results_of_one_folder_do_not_overwrite_each_other(sets, tmp_path, caplog):
    """A script that gives two evaluators one folder: the newest has the names of the files."""
    out = tmp_path / "o"
    for name in NAMES:
        records = DatasetCatalog.get(name)
        evaluator = COCOEvaluator(name, output_dir=str(out))
        inference_on_dataset(Truth(records, CLASSES), [[r] for r in records], evaluator)
    files = (out / "coco_instances_results.json", out / NAMES[0] / "coco_instances_results.json")
    ids = [{row["image_id"] for row in json.loads(file.read_text())} for file in files]
    assert ids == [{50, 51, 52, 53}, {0, 1, 2, 3}]
    assert (out / NAMES[0] / "instances_predictions.pth").exists()
    assert f"is of test set '{NAMES[0]}': moved to {out / NAMES[0]}" in caplog.text
    truths = [MetadataCatalog.get(name).json_file for name in NAMES]
    assert stale_results(files[0], truths[1]) == stale_results(files[1], truths[0]) == ""
    assert "that have changed since" in stale_results(files[0], truths[0])


def test_results_say_that_the_labels_have_changed(sets, tmp_path, capsys):
    sets.merge_from_list(["DATASETS.TEST", NAMES[:1]])
    DefaultEvaluation.test(sets, Truth(DatasetCatalog.get(NAMES[0]), CLASSES))
    results, truth = (
        tmp_path / "o/inference/coco_instances_results.json",
        tmp_path / "images/truth.json",
    )
    arguments = ["--dataset", str(truth), "--results", str(results), "--samples", "10"]
    evaluate_groups_main(arguments)
    assert "warning" not in capsys.readouterr().err
    content = json.loads(truth.read_text())
    content["annotations"][0]["bbox"][0] += 1
    truth.write_text(json.dumps(content))
    evaluate_groups_main(arguments)
    assert "evaluate again" in capsys.readouterr().err


def test_the_report_finds_the_results_of_several_test_sets(sets, tmp_path):
    DefaultEvaluation.test(sets, Truth(DatasetCatalog.get(NAMES[0]), CLASSES))
    (tmp_path / "o/config.yaml").write_text(sets.dump())
    page = write_report(tmp_path / "o").read_text()
    assert f"Shown: {NAMES[0]}, whose results are stored. Also stored: {NAMES[1]}." in page
    assert "No COCO results" not in page
