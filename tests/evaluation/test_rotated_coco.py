import json
import math

import cv2
import numpy as np
import pytest
import torch

from d2kit.data import DatasetCatalog, MetadataCatalog
from d2kit.evaluation import RotatedCOCOEvaluator
from d2kit.structures import Boxes, BoxMode, Instances, RotatedBoxes
from tests.evaluation.ap_oracle import average_precision

SIZE = (200, 300)
CLASSES = 3


def area_of(box):
    return box[2] * box[3]


def polygon_overlap(a, b, crowd):
    """IoU by OpenCV's intersection of rotated rectangles (angles are clockwise there)."""
    first, second = (((x, y), (w, h), -angle) for x, y, w, h, angle in (a, b))
    kind, points = cv2.rotatedRectangleIntersection(first, second)
    shared = 0.0
    if kind != cv2.INTERSECT_NONE and points is not None and len(points) > 2:
        shared = cv2.contourArea(cv2.convexHull(points))
    return shared / (area_of(a) if crowd else area_of(a) + area_of(b) - shared)


def scene(seed, images=14):
    """Ground truth and detections with ties, crowds, empty images and all area ranges."""
    rng = np.random.default_rng(seed)
    records, found = [], {}
    for i in range(images):
        truths = []
        for _ in range(0 if i % 5 == 2 else rng.integers(1, 6)):
            side = np.exp(rng.uniform(np.log(8), np.log(220), 2))
            box = [*rng.uniform(30, [270, 170]), *side, rng.uniform(-180, 180)]
            truths.append(
                {
                    "bbox": [float(v) for v in box],
                    "bbox_mode": BoxMode.XYWHA_ABS,
                    "category_id": int(rng.integers(CLASSES)),
                    "iscrowd": int(rng.random() < 0.15),
                }
            )
        records.append(
            {
                "file_name": f"{i}.png",
                "image_id": 10 + 3 * i,
                "height": SIZE[0],
                "width": SIZE[1],
                "annotations": truths,
            }
        )
        rows = []
        for truth in truths * 2 if i % 6 != 4 else []:
            noise = rng.normal(0, [2, 2, 2, 2, 6]) * rng.choice([0, 0.3, 1, 3])
            box = np.array(truth["bbox"]) + noise
            box[2:4] = box[2:4].clip(1)
            score = float(np.round(rng.random(), 1 if rng.random() < 0.5 else 5))
            rows.append((box.tolist(), score, truth["category_id"]))
        for _ in range(rng.integers(0, 4)):
            box = [*rng.uniform(0, [300, 200]), *rng.uniform(2, 60, 2), rng.uniform(-180, 180)]
            rows.append((box, 0.5, int(rng.integers(CLASSES))))
        found[10 + 3 * i] = rows
    return records, found


@pytest.fixture
def register():
    names = []

    def add(records, **metadata):
        name = f"rotated_{len(names)}"
        names.append(name)
        DatasetCatalog.register(name, lambda: records)
        MetadataCatalog.get(name).set(thing_classes=[f"c{i}" for i in range(CLASSES)], **metadata)
        return name

    yield add
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def instances(rows, kind=RotatedBoxes):
    result = Instances(SIZE)
    result.pred_boxes = kind([box for box, _, _ in rows])
    result.scores = torch.tensor([score for _, score, _ in rows], dtype=torch.float64)
    result.pred_classes = torch.tensor([c for _, _, c in rows], dtype=torch.int64)
    return result


def evaluate(evaluator, records, found, **kwargs):
    evaluator.reset()
    for record in records:
        rows = found.get(record["image_id"], [])
        evaluator.process([record], [{"instances": instances(rows)}])
    return evaluator.evaluate(**kwargs)["bbox"]


@pytest.mark.parametrize("use_fast_impl", [True, False])
def test_ground_truth_as_detections_gives_100(register, use_fast_impl):
    records, _ = scene(0)
    found = {
        r["image_id"]: [
            (a["bbox"], 0.9, a["category_id"]) for a in r["annotations"] if not a["iscrowd"]
        ]
        for r in records
    }
    evaluator = RotatedCOCOEvaluator(register(records), use_fast_impl=use_fast_impl)
    results = evaluate(evaluator, records, found)
    assert results == pytest.approx(dict.fromkeys(results, 100.0))
    assert {"AP", "AP50", "AP75", "APs", "APm", "APl", "AP-c0"} <= set(results)
    turned = {
        k: [([*box[:4], box[4] + 180], s, c) for box, s, c in rows] for k, rows in found.items()
    }
    assert evaluate(evaluator, records, turned)["AP"] == pytest.approx(100.0)
    wrong = {k: [([*box[:4], 0.0], s, c) for box, s, c in rows] for k, rows in found.items()}
    assert evaluate(evaluator, records, wrong)["AP"] < 80


@pytest.mark.parametrize("seed", range(4))
def test_both_backends_and_a_third_program_agree(register, seed):
    records, found = scene(seed)
    name = register(records)
    results = [
        evaluate(RotatedCOCOEvaluator(name, use_fast_impl=fast), records, found)
        for fast in (True, False)
    ]
    assert results[0] == pytest.approx(results[1], abs=1e-6, nan_ok=True)
    truths = {
        r["image_id"]: [(a["bbox"], a["category_id"], bool(a["iscrowd"])) for a in r["annotations"]]
        for r in records
    }
    # RotatedBoxes are float32
    rounded = {
        k: [(np.float32(box).tolist(), s, c) for box, s, c in rows] for k, rows in found.items()
    }
    expected = average_precision(truths, rounded, CLASSES, polygon_overlap, area_of)
    assert {k: v for k, v in results[0].items() if not k.startswith("AP-")} == pytest.approx(
        expected, abs=0.05, nan_ok=True
    )


def test_a_subset_and_the_files(register, tmp_path):
    records, found = scene(1)
    evaluator = RotatedCOCOEvaluator(register(records), output_dir=str(tmp_path))
    ids = [r["image_id"] for r in records[:4]]
    some = evaluate(evaluator, records, found, img_ids=ids)
    few = RotatedCOCOEvaluator(register(records[:4]))
    assert some == pytest.approx(evaluate(few, records[:4], found), nan_ok=True)
    written = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert {len(row["bbox"]) for row in written} == {5}
    assert len(written) == sum(map(len, found.values()))


@pytest.mark.parametrize("use_fast_impl", [True, False])
def test_nothing_found_is_zero(register, use_fast_impl):
    records, _ = scene(2)
    evaluator = RotatedCOCOEvaluator(register(records), use_fast_impl=use_fast_impl)
    assert evaluate(evaluator, records, {})["AP"] == 0


def test_upright_boxes_count_as_angle_0(register):
    records, _ = scene(3, images=1)
    records[0]["annotations"] = [
        {"bbox": [50, 60, 40, 20, 0], "bbox_mode": BoxMode.XYWHA_ABS, "category_id": 0},
        {"bbox": [100, 100, 40, 20], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1},
    ]
    evaluator = RotatedCOCOEvaluator(register(records))
    upright = instances([([30, 50, 70, 70], 0.9, 0), ([100, 100, 140, 120], 0.8, 1)], Boxes)
    evaluator.process(records, [{"instances": upright}])
    results = evaluator.evaluate()["bbox"]
    assert results["AP"] == pytest.approx(100)
    assert math.isnan(results["AP-c2"])


def test_wrong_use_is_named(register, tmp_path):
    records, _ = scene(0, images=2)
    with pytest.raises(ValueError, match="boxes only"):
        RotatedCOCOEvaluator(register(records), tasks=("bbox", "segm"))
    broken = tmp_path / "broken.json"
    broken.write_text('{"images": [], "annotations": [{"bbox": [1, 2, 3]}]}')
    with pytest.raises(ValueError, match=r"broken\.json"):
        RotatedCOCOEvaluator(register(records, json_file=str(broken)))
