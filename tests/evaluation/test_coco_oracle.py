"""hotcoco and pycocotools give the same figures to the last bit."""

import contextlib
import copy
import io

import numpy as np
import pytest

from d2kit.evaluation.backend import COCOeval_opt
from d2kit.evaluation.coco_evaluation import COCOevalMaxDets, _evaluate_predictions_on_coco
from tests.support.coco_synthetic import dataset


def pycoco(truth):
    from pycocotools.coco import COCO

    coco = COCO()
    coco.dataset = copy.deepcopy(truth)
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def both(truth, results, task, **settings):
    ours = _evaluate_predictions_on_coco(pycoco(truth), results, task, **settings)
    theirs = _evaluate_predictions_on_coco(
        pycoco(truth), results, task, use_fast_impl=False, **settings
    )
    assert isinstance(ours, COCOeval_opt)
    assert isinstance(theirs, COCOevalMaxDets)
    for key in ("precision", "recall", "scores"):
        np.testing.assert_array_equal(ours.eval[key], theirs.eval[key])
    np.testing.assert_array_equal(ours.stats, theirs.stats)
    return ours, theirs


@pytest.mark.oracle
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("task", ["bbox", "segm", "keypoints"])
def test_random_detections(task, seed):
    truth, results = dataset(seed)
    ours, _ = both(truth, results, task)
    assert 0 < ours.stats[0] < 1


@pytest.mark.oracle
@pytest.mark.parametrize("task", ["bbox", "segm", "keypoints"])
def test_no_detection_at_all(task):
    truth, _ = dataset(1)
    ours, _ = both(truth, [], task)
    assert ours.stats[0] == 0


@pytest.mark.oracle
@pytest.mark.parametrize("limit", [1, 3, 10, 25, 100, 300, [1, 5, 20]])
def test_limits_of_detections(limit):
    truth, results = dataset(2)
    both(truth, results, "bbox", max_dets_per_image=limit)


@pytest.mark.oracle
@pytest.mark.parametrize("crowd", [0, 1])
def test_only_crowds_or_none(crowd):
    truth, results = dataset(3)
    for annotation in truth["annotations"]:
        annotation["iscrowd"] = crowd
    ours, _ = both(truth, results, "segm")
    assert (ours.stats[0] == -1) == bool(crowd)


@pytest.mark.oracle
def test_subset_of_images():
    truth, results = dataset(4)
    ids = [image["id"] for image in truth["images"]][::3]
    some, _ = both(truth, results, "bbox", img_ids=ids)
    everything, _ = both(truth, results, "bbox")
    assert some.stats[0] != everything.stats[0]


@pytest.mark.oracle
def test_one_class_and_all_scores_equal():
    truth, results = dataset(5, classes=1)
    for result in results:
        result["score"] = 0.5
    both(truth, results, "bbox")


@pytest.mark.oracle
def test_summary_is_that_of_pycocotools():
    from pycocotools.cocoeval import COCOeval

    truth, results = dataset(6)
    for task in ("bbox", "keypoints"):
        _, ours = both(truth, results, task)
        theirs = _evaluate_predictions_on_coco(pycoco(truth), results, task, cocoeval_fn=COCOeval)
        np.testing.assert_array_equal(ours.stats, theirs.stats)
