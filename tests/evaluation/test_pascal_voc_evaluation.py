"""VOC's AP against its published rule, one detection at a time with pixel-inclusive boxes."""

import numpy as np
import pytest
import torch

from d2kit.data.catalog import DatasetCatalog, MetadataCatalog
from d2kit.data.datasets import register_pascal_voc
from d2kit.evaluation import PascalVOCDetectionEvaluator
from d2kit.evaluation.pascal_voc_evaluation import voc_ap
from d2kit.structures import Boxes, Instances
from tests.support.voc_synthetic import CLASSES, SIZE, boxes, make

NAME = "zz_voc_evaluation"


@pytest.fixture(params=[2007, 2012])
def year(request):
    return request.param


@pytest.fixture
def truths(tmp_path, year):
    made = make(tmp_path / "VOC", seed=year)
    register_pascal_voc(NAME, str(tmp_path / "VOC"), "test", year, CLASSES)
    yield made
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def detections(truths, seed):
    """Return {image id: [(class name, score, box in VOC's pixels)]} with many equal scores."""
    rng = np.random.default_rng(seed)
    found = {}
    for number, (image_id, objects) in enumerate(truths.items()):
        rows = [(str(rng.choice(CLASSES)), b.astype(float)) for b in boxes(rng, rng.integers(0, 6))]
        for name, box, _ in objects:
            for _ in range(rng.integers(0, 3)):
                rows.append((name, np.array(box) + rng.integers(-16, 17, 4) / 8))
        rows = [] if number == 4 else rows
        found[image_id] = [(name, rng.integers(1, 8) / 8, box) for name, box in rows]
    return found


def overlap(a, b):
    """IoU of boxes that include their last pixel."""
    w = min(a[2], b[2]) - max(a[0], b[0]) + 1
    h = min(a[3], b[3]) - max(a[1], b[1]) + 1
    areas = [(x[2] - x[0] + 1) * (x[3] - x[1] + 1) for x in (a, b)]
    return w * h / (sum(areas) - w * h) if w > 0 and h > 0 else 0.0


def naive_ap(name, truths, found, threshold, year):
    """Everingham et al. 2010, section 4.2: each detection in turn, by score."""
    positives = sum(n == name and not d for objects in truths.values() for n, _, d in objects)
    if not positives:
        return None
    order = [(s, i, b) for i, rows in found.items() for n, s, b in rows if n == name]
    order.sort(key=lambda row: -row[0])
    taken, hits = set(), []
    for _, image_id, box in order:
        best, which = -1.0, None
        for index, (n, truth, _) in enumerate(truths[image_id]):
            if n == name and overlap(box, truth) > best:
                best, which = overlap(box, truth), index
        if best > threshold:
            if truths[image_id][which][2]:
                continue  # difficult
            hits.append((image_id, which) not in taken)
            taken.add((image_id, which))
        else:
            hits.append(False)
    points, good = [], 0
    for count, hit in enumerate(hits, start=1):
        good += hit
        points.append((good / positives, good / count))
    if year == 2007:
        levels = np.arange(0.0, 1.1, 0.1)
        return sum(max([p for r, p in points if r >= level], default=0) for level in levels) / 11
    area, last = 0.0, 0.0
    for index, (recall, _) in enumerate(points):
        area += (recall - last) * max(p for _, p in points[index:])
        last = recall
    return area


def outputs(rows):
    # VOC counts pixels from 1; in the continuum its pixel 1 spans [0, 1]
    tensor = torch.tensor(np.array([b for _, _, b in rows]).reshape(-1, 4))
    tensor[:, :2] -= 1
    found = Instances(SIZE, pred_boxes=Boxes(tensor.float()))
    found.scores = torch.tensor([s for _, s, _ in rows])
    found.pred_classes = torch.tensor([CLASSES.index(n) for n, _, _ in rows], dtype=torch.int64)
    return {"instances": found}


def ours(found):
    evaluator = PascalVOCDetectionEvaluator(NAME)
    for image_id, rows in found.items():
        evaluator.process([{"image_id": image_id}], [outputs(rows)])
    return evaluator.evaluate()["bbox"]


@pytest.mark.parametrize("seed", range(3))
def test_ap_equals_the_published_rule(truths, year, seed):
    found = detections(truths, seed)
    table = np.array(
        [
            [naive_ap(name, truths, found, t / 100, year) for t in range(50, 100, 5)]
            for name in CLASSES
            if naive_ap(name, truths, found, 0.5, year) is not None
        ]
    )
    got = ours(found)
    expected = {"AP": table.mean(), "AP50": table[:, 0].mean(), "AP75": table[:, 5].mean()}
    assert got == pytest.approx({k: v * 100 for k, v in expected.items()}, abs=1e-9)
    assert 0 < got["AP"] < 100


def test_no_detection_gives_zero(truths):
    assert ours({image_id: [] for image_id in truths}) == {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}
    assert PascalVOCDetectionEvaluator(NAME).evaluate()["bbox"]["AP"] == 0


def test_an_image_seen_twice_counts_once(truths):
    found = detections(truths, 5)
    evaluator = PascalVOCDetectionEvaluator(NAME)
    for image_id, rows in [*found.items(), *list(found.items())[:2]]:
        evaluator.process([{"image_id": image_id}], [outputs(rows)])
    assert evaluator.evaluate()["bbox"] == ours(found)


def test_wrong_use_is_told(truths):
    evaluator = PascalVOCDetectionEvaluator(NAME)
    evaluator.process([{"image_id": "other"}], [outputs([])])
    with pytest.raises(ValueError, match="image 'other' is not in split 'test'"):
        evaluator.evaluate()
    with pytest.raises(ValueError, match="no dirname, split, year, thing_classes"):
        PascalVOCDetectionEvaluator("zz_bare")
    MetadataCatalog.remove("zz_bare")


@pytest.mark.parametrize(
    ("recall", "precision", "eleven", "area"),
    [
        ([], [], 0.0, 0.0),
        ([1.0], [1.0], 1.0, 1.0),
        ([0.5, 0.5, 1.0], [1.0, 0.5, 2 / 3], (6 + 5 * 2 / 3) / 11, 0.5 + 0.5 * 2 / 3),
    ],
)
def test_curves(recall, precision, eleven, area):
    recall, precision = np.array(recall), np.array(precision)
    assert voc_ap(recall, precision, use_07_metric=True) == pytest.approx(eleven)
    assert voc_ap(recall, precision) == pytest.approx(area)
