import math

import pytest
import torch

from d2kit.modeling.box_regression import Matcher, match_boxes
from d2kit.modeling.proposal_generator.proposal_utils import (
    add_ground_truth_to_proposals,
    add_ground_truth_to_proposals_single_image,
    find_top_rpn_proposals,
)
from d2kit.structures import Boxes, Instances

SIZES = [(60, 80)]


def select(boxes, scores, **changes):
    options = {
        "nms_thresh": 0.7,
        "pre_nms_topk": 100,
        "post_nms_topk": 100,
        "min_box_size": 0.0,
        "training": False,
        **changes,
    }
    return find_top_rpn_proposals(
        [torch.tensor(b, dtype=torch.float32).reshape(1, -1, 4) for b in boxes],
        [torch.tensor(s, dtype=torch.float32).reshape(1, -1) for s in scores],
        SIZES,
        **options,
    )[0]


def test_proposals_are_sorted_clipped_and_suppressed_within_a_level_only():
    box, near = [10.0, 10, 30, 30], [10.0, 10, 30, 31]
    result = select([[box, near], [near, [-5.0, -5, 200, 200]]], [[1.0, 2.0], [0.5, 3.0]])
    assert result.objectness_logits.tolist() == [3.0, 2.0, 0.5]
    assert result.proposal_boxes.tensor.tolist() == [[0, 0, 80, 60], near, near]


@pytest.mark.parametrize(
    ("changes", "scores"),
    [
        ({}, [4.0, 3.0, 2.0, 1.0]),
        ({"pre_nms_topk": 1}, [4.0, 2.0]),
        ({"post_nms_topk": 3}, [4.0, 3.0, 2.0]),
        ({"min_box_size": 10.0}, [4.0, 2.0]),
    ],
)
def test_limits(changes, scores):
    big, small = [0.0, 0, 20, 20], [30.0, 30, 40, 40]
    result = select([[big, small], [big, small]], [[4.0, 3.0], [2.0, 1.0]], **changes)
    assert result.objectness_logits.tolist() == scores


def test_no_usable_box_gives_empty_proposals():
    result = select([[[90.0, 70, 95, 75]]], [[1.0]])
    assert len(result) == 0
    assert result.proposal_boxes.tensor.shape == (0, 4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_values_are_dropped_at_inference_and_an_error_in_training(bad):
    boxes = [[[0.0, 0, 20, 20], [bad, 0, 30, 30]]]
    assert len(select(boxes, [[1.0, 2.0]])) == 1
    with pytest.raises(FloatingPointError, match="box regression"):
        select(boxes, [[1.0, 2.0]], training=True)
    with pytest.raises(FloatingPointError, match="objectness"):
        select([[[0.0, 0, 20, 20]]], [[math.nan]], training=True)


def test_ground_truth_is_appended_with_an_almost_certain_logit():
    proposals = Instances(
        (60, 80), proposal_boxes=Boxes(torch.zeros(2, 4)), objectness_logits=torch.zeros(2)
    )
    gt = Instances((60, 80), gt_boxes=Boxes(torch.ones(1, 4)))
    (joined,) = add_ground_truth_to_proposals([gt], [proposals])
    assert joined.proposal_boxes.tensor.tolist() == [[0.0] * 4] * 2 + [[1.0] * 4]
    assert joined.objectness_logits[2].sigmoid() == pytest.approx(1 - 1e-10)
    assert len(add_ground_truth_to_proposals_single_image(gt.gt_boxes, proposals)) == 3
    with pytest.raises(ValueError, match="2 images"):
        add_ground_truth_to_proposals([gt], [proposals, proposals])
    proposals.level = torch.zeros(2)
    with pytest.raises(ValueError, match="level"):
        add_ground_truth_to_proposals([gt], [proposals])


@pytest.mark.parametrize("count", [0, 1, 7, 40])
@pytest.mark.parametrize("low_quality", [False, True])
def test_matching_in_parts_equals_matching_at_once(count, low_quality):
    rng = torch.Generator().manual_seed(count)

    def draw(n):
        corner = torch.rand(n, 2, generator=rng) * 50
        return Boxes(torch.cat([corner, corner + 5 + torch.rand(n, 2, generator=rng) * 20], 1))

    gt, boxes = draw(count), draw(100)
    matcher = Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=low_quality)
    whole, parts = match_boxes(matcher, gt, boxes), match_boxes(matcher, gt, boxes, max_pairs=300)
    assert torch.equal(whole[0], parts[0])
    assert torch.equal(whole[1], parts[1])
    assert matcher.allow_low_quality_matches is low_quality
