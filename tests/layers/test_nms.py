import numpy as np
import pytest
import torch

from d2kit.layers import batched_nms, batched_nms_rotated, nms, nms_rotated
from d2kit.layers.rotated_boxes import pairwise_iou_rotated
from tests.support.reference_files import reference_path


def upright(boxes):
    size = boxes[:, 2:] - boxes[:, :2]
    return torch.cat([boxes[:, :2] + size / 2, size, torch.zeros(len(boxes), 1)], dim=1)


def test_reference_values():
    vectors = np.load(reference_path("ops/nms.npz"))
    t = {name: torch.as_tensor(vectors[name]) for name in vectors}
    keep = batched_nms(t["boxes"], t["scores"], t["idxs"], 0.5)
    assert torch.equal(keep, t["keep"])
    turned = batched_nms_rotated(upright(t["boxes"]), t["scores"], t["idxs"], 0.5)
    assert torch.equal(turned, t["keep"])
    one = t["idxs"] == 0
    boxes, scores = t["boxes"][one], t["scores"][one]
    assert torch.equal(nms_rotated(upright(boxes), scores, 0.5), nms(boxes, scores, 0.5))


@pytest.mark.parametrize("threshold", [0.1, 0.5])
def test_rotated_is_greedy(threshold):
    g = torch.Generator().manual_seed(0)
    boxes = torch.rand(80, 5, generator=g) * torch.tensor([30.0, 30, 20, 20, 360])
    scores, idxs = torch.rand(80, generator=g), torch.randint(0, 3, (80,), generator=g)
    iou, kept = pairwise_iou_rotated(boxes, boxes), []
    for i in scores.argsort(descending=True).tolist():
        if all(iou[i, j] <= threshold or idxs[i] != idxs[j] for j in kept):
            kept.append(i)
    assert batched_nms_rotated(boxes, scores, idxs, threshold).tolist() == kept
    assert 0 < len(kept) < 80


def test_no_boxes_and_wrong_shapes():
    none = torch.zeros(0), torch.zeros(0, dtype=torch.long)
    assert batched_nms(torch.zeros(0, 4), *none, 0.5).shape == (0,)
    assert batched_nms_rotated(torch.zeros(0, 5), *none, 0.5).shape == (0,)
    assert nms_rotated(torch.tensor([[1.0, 1, 2, 2, 0]]), torch.ones(1), 0.5).tolist() == [0]
    with pytest.raises(ValueError, match=r"\(R, 4\)"):
        batched_nms(torch.zeros(0, 5), *none, 0.5)
    with pytest.raises(ValueError, match=r"\(R, 5\)"):
        batched_nms_rotated(torch.zeros(0, 4), *none, 0.5)


def test_half_precision_boxes_are_compared_in_float():
    boxes = torch.tensor([[0, 0, 1000, 1000], [0, 0, 1000, 990]], dtype=torch.float16)
    keep = batched_nms(boxes, torch.tensor([0.9, 0.8]), torch.zeros(2).long(), 0.985)
    assert keep.tolist() == [0]
