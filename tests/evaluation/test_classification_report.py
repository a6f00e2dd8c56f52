"""`ClassificationReport` against counts made by hand and by brute force."""

import json
import math

import numpy as np
import pytest
import torch

from d2kit.data import DatasetCatalog, MetadataCatalog
from d2kit.evaluation import ClassificationReport
from d2kit.evaluation.classification_report import ImageEntry, best_thresholds, match, rates
from d2kit.structures import Boxes, BoxMode, Instances
from d2kit.visualization.plots import plot_confusion

NAME = "classification_report_tests"
NAMES = ["suv", "sedan", "van"]
A, B, C = [0, 0, 10, 10], [20, 20, 40, 40], [60, 60, 90, 90]


def record(image_id, *annotations):
    objects = [
        {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": k, "iscrowd": crowd}
        for box, k, crowd in annotations
    ]
    return {"image_id": image_id, "height": 100, "width": 100, "annotations": objects}


@pytest.fixture
def dataset():
    records = [
        record(1, (A, 0, 0)),
        record(2, (A, 1, 0), (B, 1, 0)),
        record(3, (A, 2, 0), (B, 0, 0)),  # two classes: not in the view by image
        record(4, (C, 2, 0)),
        record(5),
        record(6, (A, 0, 0), (C, 0, 1)),
    ]
    DatasetCatalog.register(NAME, lambda: records)
    MetadataCatalog.get(NAME).set(thing_classes=NAMES)
    yield
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def found(*detections):
    boxes, classes, scores = zip(*detections, strict=True) if detections else ((), (), ())
    return {
        "instances": Instances(
            (100, 100),
            pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)),
            pred_classes=torch.tensor(classes, dtype=torch.int64),
            scores=torch.tensor(scores, dtype=torch.float32),
        )
    }


OUTPUTS = {
    1: found((A, 0, 0.9), (B, 1, 0.8)),  # right, and one of nothing
    2: found((A, 1, 0.7), (B, 0, 0.75)),  # right, confused; the best score is the wrong one
    3: found((A, 2, 0.9)),  # right, one missed
    4: found(),  # missed
    5: found((C, 0, 0.2)),  # below the threshold
    6: found((A, 0, 0.6), ([62, 62, 80, 80], 1, 0.55)),  # right, one on a crowd
}


def run(tmp_path=None, ids=OUTPUTS):
    report = ClassificationReport(NAME, output_dir=str(tmp_path) if tmp_path else None)
    report.process([{"image_id": i} for i in ids], [OUTPUTS[i] for i in ids])
    return report.evaluate()


def test_counts_and_files(dataset, tmp_path):
    result = run(tmp_path)
    saved = json.loads((tmp_path / "classification_report.json").read_text())
    assert saved["image"]["confusion"] == [[2, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]]
    assert saved["instance"]["confusion"] == [
        [2, 0, 0, 1],
        [1, 1, 0, 0],
        [0, 0, 1, 1],
        [0, 1, 0, 0],
    ]
    image, instance = result["class_by_image"], result["class_by_instance"]
    assert image["accuracy"] == pytest.approx(50)
    assert image["F1-suv"] == pytest.approx(80)
    assert image["F1-van"] == 0
    assert instance["accuracy"] == pytest.approx(50)
    assert instance["precision"] == pytest.approx(100 * np.mean([2 / 3, 1 / 2, 1]))
    assert instance["recall"] == pytest.approx(100 * np.mean([2 / 3, 1 / 2, 1 / 2]))
    assert saved["best_thresholds"]["van"]["threshold"] == pytest.approx(0.9)
    assert saved["image"]["precision"][1] is None, "nothing was called a sedan"
    assert (tmp_path / "confusion.png").read_bytes()[:4] == b"\x89PNG"


def test_no_detection_at_all(dataset):
    result = run(ids=[4, 5])
    assert result["class_by_image"]["accuracy"] == 0
    assert math.isnan(result["class_by_image"]["precision"])
    assert result["class_by_instance"]["recall"] == 0
    assert ClassificationReport(NAME).evaluate() == {}


def test_foreign_images_and_unnamed_classes_are_errors(dataset):
    report = ClassificationReport(NAME)
    report.process([{"image_id": 99}], [found()])
    with pytest.raises(ValueError, match="image id 99 is not in dataset"):
        report.evaluate()
    MetadataCatalog.get("classification_report_bare").name  # noqa: B018
    with pytest.raises(ValueError, match="has no thing_classes"):
        ClassificationReport("classification_report_bare")


def random_entries(rng, count=30, classes=3):
    entries = []
    for _ in range(count):
        g, r = rng.integers(0, 4), rng.integers(0, 6)
        corners = rng.uniform(0, 60, (g, 2))
        gt = np.concatenate([corners, corners + rng.uniform(10, 40, (g, 2))], 1)
        near = gt[rng.integers(0, g, r)] + rng.normal(0, 4, (r, 4)) if g else np.zeros((r, 4))
        entries.append(
            ImageEntry(
                gt,
                rng.integers(0, classes, g),
                rng.random(g) < 0.15,
                near,
                rng.choice([0.2, 0.4, 0.6, 0.8], r),  # ties
                rng.integers(0, classes, r),
            )
        )
    return entries


@pytest.mark.parametrize("seed", range(5))
def test_best_threshold_is_the_best_of_all(seed):
    entries = random_entries(np.random.default_rng(seed))
    best = best_thresholds(entries, 3, 0.5)
    for k in range(3):
        tried = {}
        for threshold in (0.2, 0.4, 0.6, 0.8):
            hits = count = truths = 0
            for e in entries:
                kept = (e.scores >= threshold) & (e.classes == k)
                part = ImageEntry(
                    e.gt_boxes,
                    e.gt_classes,
                    e.crowd,
                    e.boxes[kept],
                    e.scores[kept],
                    e.classes[kept],
                )
                indices = match(part, 0.5, by_class=True)
                hits += int((indices >= 0).sum())
                count += int((indices != -2).sum())
                truths += int(((e.gt_classes == k) & ~e.crowd).sum())
            tried[threshold] = 2 * hits / (truths + count)
        assert best[k]["F1"] == pytest.approx(max(tried.values()))
        assert tried[best[k]["threshold"]] == pytest.approx(best[k]["F1"])


def test_rates_are_those_of_the_definitions():
    table = np.array([[5, 1, 0], [2, 6, 2]])
    values = rates(table, 2)
    np.testing.assert_allclose(values["precision"], [5 / 7, 6 / 7])
    np.testing.assert_allclose(values["recall"], [5 / 6, 6 / 10])
    np.testing.assert_allclose(values["F1"], [10 / 13, 12 / 17])
    np.testing.assert_allclose(values["accuracy"], [13 / 16, 11 / 16])


def test_confusion_is_drawn(tmp_path):
    table = np.array([[5, 1, 0], [2, 6, 2]])
    path = plot_confusion(
        {"a": (table, "xy", "xyz"), "b": (table, "xy", "xyz")}, tmp_path / "c.png"
    )
    assert path.stat().st_size > 5000
