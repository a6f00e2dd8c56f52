import copy
import itertools
import json
import logging

import numpy as np
import pytest

from d2kit.data.catalog import MetadataCatalog
from d2kit.evaluation import LVISEvaluator
from d2kit.evaluation.lvis_evaluation import METRICS, _evaluate_predictions_on_lvis
from tests.evaluation.test_coco_evaluator import run, to_outputs
from tests.support.coco_synthetic import dataset

NAME = "zz_lvis_evaluation"


def lvis_dataset(seed, classes=7, **settings):
    """Return LVIS ground truth and results: federated, some classes not exhaustive."""
    rng = np.random.default_rng(seed)
    truth, results = dataset(seed, classes=classes, **settings)
    for number, category in enumerate(truth["categories"]):
        category.update(frequency="rcf"[number % 3], image_count=number + 1)
    categories = [c["id"] for c in truth["categories"]]
    for image in truth["images"]:
        here = {a["category_id"] for a in truth["annotations"] if a["image_id"] == image["id"]}
        image["neg_category_ids"] = [c for c in categories if c not in here and rng.random() < 0.5]
        image["not_exhaustive_category_ids"] = [c for c in sorted(here) if rng.random() < 0.3]
    for annotation in truth["annotations"]:
        for key in ("iscrowd", "keypoints", "num_keypoints"):
            del annotation[key]
    return truth, [{k: v for k, v in r.items() if k != "keypoints"} for r in results]


def theirs(truth, results, task, limit):
    """What the package ``lvis`` computes."""
    lvis = pytest.importorskip("lvis")
    logging.disable(logging.CRITICAL)
    try:
        real = lvis.LVIS.__new__(lvis.LVIS)
        real.logger, real.dataset = logging.getLogger("lvis"), copy.deepcopy(truth)
        real._create_index()
        drop = "bbox" if task == "segm" else "segmentation"  # else areas are those of boxes
        found = [{k: v for k, v in r.items() if k != drop} for r in copy.deepcopy(results)]
        evaluation = lvis.LVISEval(real, lvis.LVISResults(real, found, max_dets=limit), task)
        evaluation.params.max_dets = limit
        evaluation.run()
    finally:
        logging.disable(logging.NOTSET)
    return {
        key: evaluation.results[key] * 100 if evaluation.results[key] >= 0 else float("nan")
        for key in METRICS
    }


@pytest.mark.oracle
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("task", "limit"), itertools.product(["bbox", "segm"], [300, 10]))
def test_figures_equal_the_package(monkeypatch, task, limit, seed):
    monkeypatch.setattr(np, "float", float, raising=False)  # taken away by numpy 1.24
    truth, results = lvis_dataset(seed, images=16)
    ours = _evaluate_predictions_on_lvis(as_coco(truth), results, task, limit)
    np.testing.assert_equal(ours, theirs(truth, results, task, limit))
    assert 0 < ours["AP"] < 100


@pytest.mark.oracle
def test_all_scores_equal(monkeypatch):
    monkeypatch.setattr(np, "float", float, raising=False)
    truth, results = lvis_dataset(9)
    for result in results:
        result["score"] = 0.5
    ours = _evaluate_predictions_on_lvis(as_coco(truth), results, "bbox")
    np.testing.assert_equal(ours, theirs(truth, results, "bbox", 300))


def as_coco(truth):
    import hotcoco

    return hotcoco.LVIS(copy.deepcopy(truth))


@pytest.fixture
def files(tmp_path):
    truth, results = lvis_dataset(3, images=8)
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    mapping = {c["id"]: i for i, c in enumerate(truth["categories"])}
    MetadataCatalog.get(NAME).set(
        json_file=str(tmp_path / "truth.json"),
        thing_classes=[c["name"] for c in truth["categories"]],
        thing_dataset_id_to_contiguous_id=mapping,
    )
    yield truth, results, mapping, tmp_path
    MetadataCatalog.remove(NAME)


def test_evaluator_gives_what_the_function_gives(files):
    truth, results, mapping, folder = files
    inputs, outputs = to_outputs(truth, results, mapping)
    got = run(LVISEvaluator(NAME, output_dir=str(folder / "out")), inputs, outputs)
    written = json.loads((folder / "out/lvis_instances_results.json").read_text())
    assert len(written) == len(results)
    assert list(got) == ["bbox", "segm"]
    for task in got:
        assert list(got[task]) == list(METRICS)
        expected = _evaluate_predictions_on_lvis(as_coco(truth), written, task)
        np.testing.assert_equal(got[task], expected)
    assert got["bbox"]["AP"] > 0
    only = run(LVISEvaluator(NAME, tasks=("bbox",), max_dets_per_image=2), inputs, outputs)
    assert list(only) == ["bbox"]
    assert only["bbox"]["AP"] < got["bbox"]["AP"]


def test_no_detection_gives_zero(files):
    truth, _, mapping, _ = files
    inputs, outputs = to_outputs(truth, [], mapping)
    got = run(LVISEvaluator(NAME), inputs, outputs)
    assert got["bbox"]["AP"] == 0


def test_wrong_use_is_told(files, tmp_path):
    truth, *_ = files
    with pytest.raises(ValueError, match="LVISEvaluator knows bbox, segm"):
        LVISEvaluator(NAME, tasks=("keypoints",))
    for image in truth["images"]:
        del image["neg_category_ids"]
    del truth["categories"][0]["frequency"]
    (tmp_path / "plain.json").write_text(json.dumps(truth))
    MetadataCatalog.get("zz_plain").set(json_file=str(tmp_path / "plain.json"))
    with pytest.raises(ValueError, match=r"plain\.json: no 'neg_cat.*, no 'freq.*category 1:"):
        LVISEvaluator("zz_plain")
    MetadataCatalog.remove("zz_plain")
