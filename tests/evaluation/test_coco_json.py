import json
import pickle

import numpy as np
import pytest
import torch

from d2kit.evaluation.coco_evaluation import instances_to_coco_json
from d2kit.evaluation.coco_results import HeldResults, read_coco_results
from d2kit.structures import BitMasks, Boxes, Instances
from tests.support.reference_files import reference_path


def reference():
    arrays = np.load(reference_path("ops/instances_to_coco.npz"))
    expected = json.loads(reference_path("ops/instances_to_coco.json").read_text())
    masks = torch.from_numpy(arrays["masks"])
    instances = Instances(
        tuple(masks.shape[1:]),
        pred_boxes=Boxes(torch.from_numpy(arrays["boxes"])),
        scores=torch.from_numpy(arrays["scores"]),
        pred_classes=torch.from_numpy(arrays["classes"]),
        pred_masks=masks,
    )
    return instances, expected


def test_equals_reference():
    instances, expected = reference()
    assert instances_to_coco_json(instances, 17) == expected


def test_input_is_not_changed():
    instances, _ = reference()
    before = instances.pred_boxes.tensor.clone()
    instances_to_coco_json(instances, 17)
    assert torch.equal(instances.pred_boxes.tensor, before)


@pytest.mark.parametrize("form", ["bitmasks", "uint8", "rle"])
def test_forms_of_masks(form):
    instances, expected = reference()
    masks = instances.pred_masks
    instances.pred_masks = {
        "bitmasks": lambda: BitMasks(masks),
        "uint8": lambda: masks.to(torch.uint8),
        "rle": lambda: [row["segmentation"] for row in expected],
    }[form]()
    assert instances_to_coco_json(instances, 17) == expected


def test_held_results_are_a_list_to_who_looks():
    instances, expected = reference()
    held = pickle.loads(pickle.dumps(HeldResults(instances, 17)))
    assert len(held) == len(expected)
    assert held == expected == list(held) == held + [] == [] + held
    assert held[:2] == expected[:2]
    held[0]["score"] = 0.5
    assert held[0]["score"] == next(iter(held))["score"] == 0.5


def test_held_results_do_not_hold_their_images_tensors():
    """Boxes are often rows of a larger tensor, which must go with the batch."""
    instances, _ = reference()
    before = HeldResults(instances, 17)
    instances.pred_boxes.tensor += 9
    instances.scores += 1
    assert before == reference()[1]


@pytest.mark.parametrize("fields", [("pred_boxes",), ("pred_boxes", "pred_keypoints")])
def test_nothing_found(fields):
    of = {"pred_boxes": Boxes(torch.zeros(0, 4)), "pred_keypoints": torch.zeros(0, 17, 3)}
    found = Instances((4, 4), **{name: of[name] for name in fields})
    assert instances_to_coco_json(found, 1) == list(HeldResults(found, 1)) == []
    assert len(pickle.loads(pickle.dumps(HeldResults(found, 1)))) == 0


@pytest.mark.parametrize("count", [0, 1, 4])
def test_counts(count):
    instances, expected = reference()
    assert instances_to_coco_json(instances[:count], 17) == expected[:count]


def test_roi_masks_equal_pasted_masks():
    from d2kit.structures import ROIMasks

    generator = torch.Generator().manual_seed(0)
    boxes = Boxes(torch.tensor([[3.2, 4.1, 40.7, 33.3], [20.0, 2.0, 60.0, 50.0], [0, 0, 64, 48.0]]))
    soft = torch.rand(3, 28, 28, generator=generator)
    soft = torch.nn.functional.avg_pool2d(soft, 9, 1, 4)
    soft = (soft - soft.amin()) / (soft.amax() - soft.amin())
    roi = ROIMasks(soft)
    instances = Instances(
        (48, 64), pred_boxes=boxes, scores=torch.ones(3), pred_classes=torch.arange(3)
    )
    pasted = Instances((48, 64), **instances.get_fields())
    pasted.pred_masks = roi.to_bitmasks(boxes, 48, 64, 0.5).tensor
    instances.pred_masks = roi
    assert instances_to_coco_json(instances, 1) == instances_to_coco_json(pasted, 1)


def test_keypoints_are_pixel_indices():
    instances = Instances(
        (10, 10),
        pred_boxes=Boxes(torch.tensor([[0.0, 0, 5, 5]])),
        scores=torch.tensor([0.5]),
        pred_classes=torch.tensor([0]),
        pred_keypoints=torch.tensor([[[1.5, 2.5, 0.25], [3.0, 4.0, 1.0]]]),
    )
    (row,) = instances_to_coco_json(instances, 1)
    assert row["keypoints"] == [1.0, 2.0, 0.25, 2.5, 3.5, 1.0]


GOOD = {"image_id": 1, "category_id": 2, "bbox": [1, 2, 3, 4], "score": 0.5}


@pytest.mark.faults(40, fast=True)
@pytest.mark.parametrize(
    ("result", "words"),
    [
        ([1], "expected an object"),
        ({**GOOD, "score": None}, "score: expected a finite number, got None"),
        ({**GOOD, "score": float("nan")}, "score"),
        ({**GOOD, "bbox": [1, 2, 3]}, "bbox: expected four or five"),
        ({**GOOD, "bbox": [1, 2, 3, 10**400]}, "bbox"),
        ({**GOOD, "image_id": [1]}, "image_id: expected an integer or text"),
        ({**GOOD, "category_id": True}, "category_id"),
        ({**GOOD, "segmentation": {"size": [3, 3], "counts": "~~~"}}, "segmentation"),
        ({**GOOD, "segmentation": {"size": "ab", "counts": "1"}}, "segmentation"),
        ({**GOOD, "keypoints": [1, None]}, "keypoints"),
        ({k: v for k, v in GOOD.items() if k != "bbox"}, "bbox: .*it is missing"),
    ],
)
def test_wrong_results_of_a_file_are_named(tmp_path, result, words):
    path = tmp_path / "results.json"
    path.write_text(json.dumps([GOOD, result]))
    with pytest.raises(ValueError, match=rf"results.json: result number 1: {words}"):
        read_coco_results(path)
    path.write_text(json.dumps([GOOD]))
    assert read_coco_results(path) == [GOOD]


def test_run_lengths_that_are_not_compressed_stay_lists():
    instances, expected = reference()
    masks = [{"size": row["segmentation"]["size"], "counts": [3, 2, 1]} for row in expected]
    instances.pred_masks = masks
    assert [row["segmentation"] for row in instances_to_coco_json(instances, 17)] == masks
