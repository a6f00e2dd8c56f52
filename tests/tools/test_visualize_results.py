"""``tools/visualize_json_results.py`` on two small images with masks, keypoints and nothing."""

import importlib.util
import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from d2kit.data import DatasetCatalog, MetadataCatalog, register_dataset
from d2kit.evaluation.coco_evaluation import instances_from_coco_json, instances_to_coco_json

NAME = "zz_visualize_results"
SIZE = 60, 80


@pytest.fixture
def script(monkeypatch):
    path = Path(__file__).parents[2] / "tools/visualize_json_results.py"
    spec = importlib.util.spec_from_file_location("visualize_json_results", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.__name__ = "__main__"  # as which its mistakes are told without a traceback

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["visualize_json_results", *map(str, arguments)])
        module.main()

    return run


def rle(x0, y0, x1, y1):
    from pycocotools import mask as mask_util

    mask = np.zeros(SIZE, np.uint8, order="F")
    mask[y0:y1, x0:x1] = 1
    code = mask_util.encode(mask)
    return {"size": list(SIZE), "counts": code["counts"].decode()}


def result(image_id, score, category=7):
    points = [value for i in range(17) for value in (20.0 + i, 30.0, 1.0)]
    return {
        "image_id": image_id,
        "category_id": category,
        "score": score,
        "bbox": [10.0, 10.0, 30.0, 20.0],
        "segmentation": rle(10, 10, 40, 30),
        "keypoints": points,
    }


@pytest.fixture
def data(tmp_path):
    for name in "ab":
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.full((*SIZE, 3), 128, np.uint8))
    truth = {
        "images": [
            {"id": i, "file_name": f"{n}.png", "height": SIZE[0], "width": SIZE[1]}
            for i, n in enumerate("ab")
        ],
        "categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 9, "bbox": [40, 20, 20, 20], "iscrowd": 0}
        ],
    }
    truth["annotations"][0]["segmentation"] = [[40, 20, 60, 20, 60, 40, 40, 40]]
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    register_dataset(NAME, tmp_path / "truth.json", tmp_path)
    yield tmp_path
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def draw(script, data, results, *more):
    text = results if isinstance(results, str) else json.dumps(results)
    (data / "results.json").write_text(text)
    output = data / "out"
    script("--input", data / "results.json", "--dataset", NAME, "--output", output, *more)
    return {p.name: cv2.imread(str(p)).astype(int) for p in sorted(output.iterdir())}


def changed(picture):
    """Whether something is drawn on the left and on the right half."""
    width = picture.shape[1] // 2
    return tuple(
        bool((abs(half - 128) > 30).any()) for half in (picture[:, :width], picture[:, width:])
    )


def test_predictions_left_truth_right(script, data):
    drawn = draw(script, data, [result(0, 0.9), result(1, 0.2)])
    assert list(drawn) == ["0_a.jpg", "1_b.jpg"]
    assert drawn["0_a.jpg"].shape == (SIZE[0], 2 * SIZE[1], 3)
    assert changed(drawn["0_a.jpg"]) == (True, False)
    assert changed(drawn["1_b.jpg"]) == (False, True)  # the score is below 0.5


def test_threshold_and_count(script, data):
    drawn = draw(script, data, [result(0, 0.2)], "--conf-threshold", "0.1", "--count", "1")
    assert list(drawn) == ["0_a.jpg"]
    assert changed(drawn["0_a.jpg"]) == (True, False)


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({"annotations": []}, "expected a list of COCO results"),
        ("[{", "results.json:1:3: not valid JSON"),
        ([result(5, 0.9)], "image 5 of the results is not in dataset"),
        ([result(0, 0.9, category=8)], "category id 8"),
        ([{"image_id": 0, "score": 0.9, "category_id": 7}], "bbox: expected"),
    ],
)
def test_wrong_results_are_told(script, data, results, message, capsys):
    with pytest.raises(SystemExit):
        draw(script, data, results)
    assert message in capsys.readouterr().err


def test_there_and_back():
    rows = [{k: v for k, v in result(3, s).items() if k != "image_id"} for s in (0.5, 0.25)]
    instances = instances_from_coco_json(rows, SIZE, {7: 2})
    assert instances.pred_classes.tolist() == [2, 2]
    again = instances_to_coco_json(instances, 3)
    expected = [{**row, "image_id": 3, "category_id": 2} for row in rows]
    assert again == expected
    assert len(instances_from_coco_json([], SIZE)) == 0
