import json
import math
import tracemalloc

import numpy as np
import pytest
import torch

from d2kit.data.catalog import DatasetCatalog, MetadataCatalog
from d2kit.evaluation import COCOEvaluator
from d2kit.evaluation.coco_evaluation import _evaluate_predictions_on_coco
from d2kit.structures import Boxes, BoxMode, Instances
from tests.support.coco_synthetic import HEIGHT, WIDTH, dataset

NAME = "d2kit_test_evaluation"


def decode(rle):
    from pycocotools import mask as mask_util

    return mask_util.decode({**rle, "counts": rle["counts"].encode()}).astype(bool)


def to_outputs(truth, results, mapping, masks=True):
    """Turn COCO results into what a loader and a model give."""
    inputs, outputs = [], []
    for image in truth["images"]:
        rows = [r for r in results if r["image_id"] == image["id"]]
        boxes = torch.tensor([r["bbox"] for r in rows], dtype=torch.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        instances = Instances(
            (HEIGHT, WIDTH),
            pred_boxes=Boxes(boxes.float()),
            scores=torch.tensor([r["score"] for r in rows], dtype=torch.float64),
            pred_classes=torch.tensor([mapping[r["category_id"]] for r in rows], dtype=torch.int64),
        )
        if masks:
            stack = [decode(r["segmentation"]) for r in rows]
            stack = np.stack(stack) if stack else np.zeros((0, HEIGHT, WIDTH), bool)
            instances.pred_masks = torch.from_numpy(stack)
        inputs.append({"image_id": image["id"]})
        outputs.append({"instances": instances})
    return inputs, outputs


@pytest.fixture
def registered(tmp_path):
    """A registered dataset whose class order is not that of its category ids."""
    truth, results = dataset(7, images=12, detections=16)
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(truth))
    mapping = {7: 0, 1: 1, 5: 2, 3: 3}
    names = [f"class {category}" for category in mapping]
    DatasetCatalog.register(NAME, lambda: [])
    MetadataCatalog.get(NAME).set(
        json_file=str(path), thing_classes=names, thing_dataset_id_to_contiguous_id=mapping
    )
    yield truth, results, mapping, tmp_path
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def run(evaluator, inputs, outputs, **settings):
    evaluator.reset()
    for start in range(0, len(inputs), 5):
        evaluator.process(inputs[start : start + 5], outputs[start : start + 5])
    return evaluator.evaluate(**settings)


@pytest.mark.parametrize("fast", [True, False])
def test_figures(registered, fast):
    truth, results, mapping, folder = registered
    evaluator = COCOEvaluator(NAME, output_dir=str(folder / "out"), use_fast_impl=fast)
    got = run(evaluator, *to_outputs(truth, results, mapping))
    assert list(got) == ["bbox", "segm"]
    for task in got:
        direct = _evaluate_predictions_on_coco(evaluator._coco_api, results, task)
        precision = direct.eval["precision"]
        assert list(got[task])[:6] == ["AP", "AP50", "AP75", "APs", "APm", "APl"]
        np.testing.assert_allclose(
            [got[task][m] for m in ("AP", "AP50", "AP75", "APs", "APm", "APl")],
            100 * np.asarray(direct.stats[:6]),
            atol=1e-9,
        )
        # the category axis rises with the category id, whatever the order of the classes
        for axis, category in enumerate((1, 3, 5)):
            assert got[task][f"AP-class {category}"] == pytest.approx(
                100 * precision[:, :, axis, 0, -1].mean(), abs=1e-9
            )
        assert math.isnan(got[task]["AP-class 7"])  # no ground truth
    written = json.loads((folder / "out/coco_instances_results.json").read_text())
    assert len(written) == len(results)
    assert {r["category_id"] for r in written} == {r["category_id"] for r in results}
    assert set(written[0]) == {"image_id", "category_id", "bbox", "score", "segmentation"}
    assert (folder / "out/instances_predictions.pth").exists()


@pytest.mark.faults(26, fast=True)
def test_predictions_are_lists_after_the_evaluation(registered):
    """What Detectron2's evaluator keeps, subclasses write as JSON."""
    truth, results, mapping, _ = registered
    evaluator = COCOEvaluator(NAME, distributed=False)
    run(evaluator, *to_outputs(truth, results, mapping))
    written = json.loads(json.dumps(evaluator._predictions))
    assert [p["image_id"] for p in written] == [image["id"] for image in truth["images"]]
    assert sum(len(p["instances"]) for p in written) == len(results)
    assert set(written[0]["instances"][0]) >= {"bbox", "score", "segmentation", "category_id"}


@pytest.mark.usefixtures("registered")
def test_a_box_takes_few_bytes_until_the_evaluation():
    evaluator = COCOEvaluator(NAME, distributed=False)
    evaluator.reset()

    def process(images):
        for i in range(images):
            found = Instances((480, 640), pred_boxes=Boxes(torch.rand(1000, 4)[:100]))
            found.scores, found.pred_classes = torch.rand(100), torch.zeros(100, dtype=torch.int64)
            evaluator.process([{"image_id": i}], [{"instances": found}])

    process(2)
    tracemalloc.start()
    process(100)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held / (100 * 100) < 60  # as dicts 500


def test_no_detection_gives_zero(registered):
    truth, _, mapping, _ = registered
    got = run(COCOEvaluator(NAME), *to_outputs(truth, [], mapping))
    assert list(got) == ["bbox", "segm"]
    assert got["bbox"]["AP"] == got["segm"]["AP-class 1"] == 0
    assert math.isnan(got["bbox"]["AP-class 7"])


def test_no_image_gives_nothing(registered):
    evaluator = COCOEvaluator(NAME)
    assert run(evaluator, [], []) == {}


def test_image_processed_twice_counts_once(registered):
    truth, results, mapping, _ = registered
    inputs, outputs = to_outputs(truth, results, mapping)
    evaluator = COCOEvaluator(NAME)
    once = run(evaluator, inputs, outputs)
    np.testing.assert_equal(run(evaluator, inputs * 2, outputs * 2), once)


def test_subset_of_images(registered):
    truth, results, mapping, _ = registered
    inputs, outputs = to_outputs(truth, results, mapping)
    evaluator = COCOEvaluator(NAME)
    ids = [image["image_id"] for image in inputs[:4]]
    some = run(evaluator, inputs[:4], outputs[:4], img_ids=ids)
    rest_missing = run(evaluator, inputs[:4], outputs[:4])
    assert some["bbox"]["AP"] > rest_missing["bbox"]["AP"]


def test_tasks_may_be_chosen(registered):
    truth, results, mapping, _ = registered
    got = run(COCOEvaluator(NAME, tasks=("segm",)), *to_outputs(truth, results, mapping))
    assert list(got) == ["segm"]


def test_limit_of_detections(registered):
    truth, results, mapping, _ = registered
    pairs = to_outputs(truth, results, mapping)
    full = run(COCOEvaluator(NAME), *pairs)
    one = run(COCOEvaluator(NAME, max_dets_per_image=1), *pairs)
    assert one["bbox"]["AP"] < full["bbox"]["AP"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(category_id=99), "4 classes"),
        (lambda r: r.pop("segmentation"), "segmentation"),
    ],
)
def test_mistakes_in_results(registered, change, message):
    truth, results, mapping, _ = registered
    mapping = {**mapping, 99: 4}
    masks = True
    change(results[0])
    if "segmentation" not in results[0]:
        masks = False
    evaluator = COCOEvaluator(NAME, tasks=("bbox", "segm"))
    with pytest.raises(ValueError, match=message):
        run(evaluator, *to_outputs(truth, results, mapping, masks=masks))


def test_unknown_image(registered):
    truth, results, mapping, _ = registered
    inputs, outputs = to_outputs(truth, results, mapping)
    inputs[0]["image_id"] = 12345
    with pytest.raises(ValueError, match="12345"):
        run(COCOEvaluator(NAME), inputs, outputs)


def test_unknown_task(registered):
    with pytest.raises(ValueError, match="boxes"):
        COCOEvaluator(NAME, tasks=("boxes",))


def test_missing_annotation_file(registered):
    _, _, _, folder = registered
    (folder / "truth.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"truth\.json"):
        COCOEvaluator(NAME)


@pytest.mark.parametrize("fast", [True, False])
def test_malformed_annotation_file(registered, fast):
    _, _, _, folder = registered
    (folder / "truth.json").write_text('{"images": [')
    with pytest.raises(ValueError, match=r"truth\.json"):
        COCOEvaluator(NAME, use_fast_impl=fast)


def test_tables_fit_100_columns(registered, caplog):
    truth, results, mapping, _ = registered
    MetadataCatalog.get(NAME).thing_classes[:] = ["x" * 60, "y" * 30, "z" * 25, "w"]
    with caplog.at_level("INFO", logger="d2kit"):
        run(COCOEvaluator(NAME), *to_outputs(truth, results, mapping))
    tables = [r.getMessage() for r in caplog.records if "\n|" in r.getMessage()]
    assert len(tables) == 4
    assert max(len(line) for table in tables for line in table.splitlines()) <= 100


def test_old_call_with_config_warns(registered, caplog):
    from d2kit.config import get_cfg

    cfg = get_cfg()
    cfg.TEST.KEYPOINT_OKS_SIGMAS = [0.1, 0.2]
    evaluator = COCOEvaluator(NAME, cfg, False)
    assert evaluator._tasks is None
    assert evaluator._kpt_oks_sigmas == [0.1, 0.2]


def test_proposals(registered):
    truth, _, _, folder = registered
    evaluator = COCOEvaluator(NAME, output_dir=str(folder / "out"))
    inputs, outputs = [], []
    for image in truth["images"]:
        mine = [a for a in truth["annotations"] if a["image_id"] == image["id"]]
        boxes = torch.tensor([a["bbox"] for a in mine], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        proposals = Instances(
            (HEIGHT, WIDTH), proposal_boxes=Boxes(boxes), objectness_logits=torch.rand(len(mine))
        )
        inputs.append({"image_id": image["id"]})
        outputs.append({"proposals": proposals})
    got = run(evaluator, inputs, outputs)
    assert list(got) == ["box_proposals"]
    expected = {f"AR{area}@{limit}" for limit in (100, 1000) for area in ("", "s", "m", "l")}
    assert set(got["box_proposals"]) == expected
    assert set(got["box_proposals"].values()) == {100.0}
    assert (folder / "out/box_proposals.pkl").exists()


@pytest.mark.parametrize("with_folder", [True, False])
def test_dataset_without_json_file(tmp_path, with_folder):
    name = f"{NAME}_plain_{with_folder}"
    square = [[10, 10, 50, 10, 50, 60, 10, 60]]
    annotation = {
        "bbox": [10, 10, 40, 50],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": 0,
        "segmentation": square,
    }
    record = {"file_name": "a.jpg", "image_id": 5, "height": HEIGHT, "width": WIDTH}
    DatasetCatalog.register(name, lambda: [{**record, "annotations": [annotation]}])
    MetadataCatalog.get(name).thing_classes = ["square", "circle"]
    try:
        folder = str(tmp_path / "out") if with_folder else None
        evaluator = COCOEvaluator(name, output_dir=folder)
        found = Instances(
            (HEIGHT, WIDTH),
            pred_boxes=Boxes(torch.tensor([[10.0, 10, 50, 60]])),
            scores=torch.tensor([0.9]),
            pred_classes=torch.tensor([0]),
        )
        got = run(evaluator, [{"image_id": 5}], [{"instances": found}])
        assert got["bbox"]["AP"] == pytest.approx(100)
        assert got["bbox"]["AP-square"] == pytest.approx(100)
        assert math.isnan(got["bbox"]["AP-circle"])
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
