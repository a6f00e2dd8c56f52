import pytest
import torch

from d2kit.evaluation.coco_evaluation import _evaluate_box_proposals
from d2kit.structures import Boxes, Instances


def ground_truth(boxes, **changes):
    import hotcoco

    annotations = [
        {"id": i + 1, "image_id": 1, "category_id": 1, "bbox": b, "area": b[2] * b[3], "iscrowd": 0}
        for i, b in enumerate(boxes)
    ]
    for annotation in annotations:
        annotation.update(changes)
    images = [{"id": 1, "height": 400, "width": 400, "file_name": "1.jpg"}]
    categories = [{"id": 1, "name": "thing"}]
    return hotcoco.COCO({"images": images, "annotations": annotations, "categories": categories})


def predictions(boxes, logits=None):
    count = len(boxes)
    logits = torch.arange(count, 0, -1).float() if logits is None else torch.tensor(logits)
    tensor = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    proposals = Instances((400, 400), proposal_boxes=Boxes(tensor), objectness_logits=logits)
    return [{"image_id": 1, "proposals": proposals}]


def test_each_proposal_covers_one_truth():
    truth = ground_truth([[0, 0, 100, 100], [0, 0, 100, 90]])
    stats = _evaluate_box_proposals(predictions([[0, 0, 100, 100]]), truth)
    assert stats["num_pos"] == 2
    assert stats["gt_overlaps"].tolist() == [0, 1]
    assert stats["recalls"].tolist() == [0.5] * 10
    assert float(stats["ar"]) == pytest.approx(0.5)


def test_partial_overlap():
    truth = ground_truth([[0, 0, 100, 100]])
    stats = _evaluate_box_proposals(predictions([[0, 0, 100, 72]]), truth)
    assert stats["gt_overlaps"].tolist() == pytest.approx([0.72])
    assert float(stats["ar"]) == pytest.approx(0.5)  # covered at 0.5, 0.55, ..., 0.7


def test_limit_takes_the_best_scored():
    truth = ground_truth([[0, 0, 100, 100]])
    guess = predictions([[0, 0, 100, 100], [200, 200, 300, 300]], logits=[0.1, 0.9])
    assert float(_evaluate_box_proposals(guess, truth, limit=1)["ar"]) == 0
    assert float(_evaluate_box_proposals(guess, truth, limit=2)["ar"]) == 1


@pytest.mark.parametrize(
    ("area", "count"), [("all", 3), ("small", 1), ("medium", 1), ("large", 1), ("96-128", 1)]
)
def test_area_ranges(area, count):
    truth = ground_truth([[0, 0, 10, 10], [0, 0, 50, 50], [0, 0, 100, 100]])
    assert _evaluate_box_proposals(predictions([]), truth, area=area)["num_pos"] == count


def test_crowds_do_not_count():
    stats = _evaluate_box_proposals(predictions([]), ground_truth([[0, 0, 9, 9]], iscrowd=1))
    assert stats["num_pos"] == 0
    assert stats["ar"].isnan()


def test_unknown_area():
    with pytest.raises(ValueError, match="huge"):
        _evaluate_box_proposals([], ground_truth([]), area="huge")
