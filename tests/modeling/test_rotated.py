import pytest
import torch

from d2kit.layers import nms_rotated
from d2kit.modeling import build_model
from d2kit.modeling.box_regression import outlines_of
from d2kit.modeling.proposal_generator.proposal_utils import find_top_rpn_proposals
from d2kit.modeling.proposal_generator.rpn import RRPN, find_top_rrpn_proposals
from d2kit.modeling.roi_heads.rotated_fast_rcnn import (
    RotatedFastRCNNOutputLayers,
    RROIHeads,
    fast_rcnn_inference_rotated,
    fast_rcnn_inference_single_image_rotated,
)
from d2kit.structures import Instances, RotatedBoxes, pairwise_iou_rotated
from tests.support.rotated import rotated_config, rotated_input
from tests.support.tiny_model import tiny_config


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model(rotated_config())


@pytest.mark.parametrize("objects", [(1, 2), (0, 1), (0, 0)])
def test_losses_and_gradients(model, objects):
    model.train().zero_grad()
    losses = model([rotated_input(i, n) for i, n in enumerate(objects)])
    assert set(losses) == {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg"}
    assert all(torch.isfinite(value) for value in losses.values())
    if sum(objects):
        assert losses["loss_box_reg"] > 0
        assert losses["loss_rpn_loc"] > 0
    sum(losses.values()).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert missing == []
    if sum(objects):
        still = [name for name, p in model.named_parameters() if not p.grad.any()]
        assert still == []


def test_parts_and_their_shapes(model):
    assert isinstance(model.proposal_generator, RRPN)
    assert isinstance(model.roi_heads, RROIHeads)
    assert isinstance(model.roi_heads.box_predictor, RotatedFastRCNNOutputLayers)
    assert model.proposal_generator.rpn_head.anchor_deltas.out_channels == 2 * 6 * 5
    assert model.roi_heads.box_predictor.bbox_pred.out_features == 2 * 5


def test_detections_are_rotated_and_scaled(model):
    model.eval()
    item = rotated_input(3)
    small = model([item])[0]["instances"]
    large = model([{**item, "height": 128, "width": 160}])[0]["instances"]
    assert isinstance(small.pred_boxes, RotatedBoxes)
    assert len(small) == len(large) > 0
    assert small.pred_boxes.tensor.shape[1] == 5
    torch.testing.assert_close(
        large.pred_boxes.tensor[:, 2:4], 2 * small.pred_boxes.tensor[:, 2:4], rtol=1e-3, atol=0.1
    )
    assert (small.pred_boxes.tensor[:, 4].abs() <= 180).all()


@pytest.mark.slow
def test_it_learns_turned_rectangles():
    torch.manual_seed(0)
    net = build_model(rotated_config("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.05))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for step in range(250):
        batch = [rotated_input(4 * step + i) for i in range(4)]
        loss = sum(net(batch).values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimizer.step()
    net.eval()
    found = []
    for seed in range(100_000, 100_020):
        item = rotated_input(seed)
        out = net([item])[0]["instances"]
        if len(out):
            found.append(pairwise_iou_rotated(out.pred_boxes[:1], item["instances"].gt_boxes).max())
    assert len(found) >= 15
    assert torch.stack(found).median() > 0.5


def test_a_few_steps_lower_the_loss():
    torch.manual_seed(0)
    net = build_model(rotated_config())
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    batch = [rotated_input(i) for i in range(2)]
    history = []
    for _ in range(12):
        losses = net(batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        history.append({name: float(value.detach()) for name, value in losses.items()})
    for name in ("loss_rpn_cls", "loss_cls"):
        assert history[-1][name] < 0.6 * history[0][name], name


BOXES = torch.tensor(
    [
        [30.0, 30.0, 20.0, 10.0, 30.0],
        [31.0, 30.0, 20.0, 10.0, 32.0],  # hides behind the first
        [30.0, 30.0, 20.0, 10.0, -60.0],  # the same place, turned: another object
        [70.0, 20.0, 0.0, 10.0, 0.0],  # no area
        [95.0, 30.0, 20.0, 10.0, 0.0],  # sticks out, nearly upright: clipped
        [95.0, 50.0, 20.0, 10.0, 45.0],  # sticks out, turned: left alone
    ]
)


@pytest.mark.parametrize("topk", [2, 100])
def test_top_proposals(topk):
    logits = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.0])
    arguments = ([BOXES[None]], [logits[None]], [(60, 100)], 0.7, 100, topk, 0.0, False)
    result = find_top_rrpn_proposals(*arguments)[0]
    assert isinstance(result.proposal_boxes, RotatedBoxes)
    expected = BOXES[[0, 2, 4, 5]][:topk].clone()
    if topk > 2:
        expected[2, [0, 2]] = torch.tensor([92.5, 15.0])
    torch.testing.assert_close(result.proposal_boxes.tensor, expected)
    assert result.objectness_logits.tolist() == [5.0, 3.0, 1.0, 0.0][:topk]
    same = find_top_rpn_proposals(*arguments)[0]
    assert torch.equal(same.proposal_boxes.tensor, result.proposal_boxes.tensor)


def test_levels_do_not_suppress_each_other():
    level = torch.tensor([[[30.0, 30.0, 20.0, 10.0, 30.0]]])
    logits = torch.tensor([[1.0]])
    result = find_top_rrpn_proposals(
        [level, level], [logits, logits], [(60, 100)], 0.5, 10, 10, 0.0, True
    )
    assert len(result[0]) == 2


def test_diverged_proposals_are_an_error_in_training():
    boxes = BOXES[None].clone()
    boxes[0, 0, 4] = float("nan")
    logits = torch.zeros(1, 6)
    with pytest.raises(FloatingPointError, match="box regression"):
        find_top_rrpn_proposals([boxes], [logits], [(60, 100)], 0.5, 10, 10, 0.0, True)
    left = find_top_rrpn_proposals([boxes], [logits], [(60, 100)], 0.5, 10, 10, 0.0, False)
    assert torch.isfinite(left[0].proposal_boxes.tensor).all()


@pytest.mark.parametrize("class_agnostic", [True, False])
def test_inference_against_one_class_at_a_time(class_agnostic):
    rng = torch.Generator().manual_seed(0)
    count, classes = 40, 3
    per_class = 1 if class_agnostic else classes
    boxes = torch.rand(count, per_class, 5, generator=rng)
    boxes = boxes * torch.tensor([60.0, 60.0, 30.0, 30.0, 120.0]) + torch.tensor(
        [10.0, 10.0, 5.0, 5.0, 5.0]
    )
    scores = torch.rand(count, classes + 1, generator=rng)
    got, rows = fast_rcnn_inference_single_image_rotated(
        boxes.flatten(1), scores, (200, 200), 0.3, 0.4, 15
    )
    expected = []
    for c in range(classes):
        own = boxes[:, 0 if class_agnostic else c]
        above = (scores[:, c] > 0.3).nonzero().squeeze(1)
        keep = above[nms_rotated(own[above], scores[above, c], 0.4)]
        expected += [(float(scores[r, c]), c, int(r)) for r in keep]
    expected = sorted(expected, reverse=True)[:15]
    assert rows.tolist() == [r for _, _, r in expected]
    assert got.pred_classes.tolist() == [c for _, c, _ in expected]
    assert got.scores.tolist() == [s for s, _, _ in expected]
    many, _ = fast_rcnn_inference_rotated(
        [boxes.flatten(1)] * 2, [scores] * 2, [(200, 200)] * 2, 0.3, 0.4, 15
    )
    assert torch.equal(many[1].pred_boxes.tensor, got.pred_boxes.tensor)


@pytest.mark.parametrize("scores", [torch.zeros(0, 3), torch.tensor([[0.1, 0.2, 0.7]])])
def test_nothing_above_the_threshold(scores):
    boxes = torch.ones(len(scores), 10)
    got, _ = fast_rcnn_inference_single_image_rotated(boxes, scores, (50, 50), 0.5, 0.5, 10)
    assert len(got) == 0
    assert got.pred_boxes.tensor.shape == (0, 5)


def test_sampling_matches_by_rotated_overlap(model):
    """A proposal at the same place but turned by 90 degrees is background."""
    target = Instances((64, 80))
    target.gt_boxes = RotatedBoxes([[40, 32, 30, 8, 20]])
    target.gt_classes = torch.tensor([1])
    proposal = Instances((64, 80))
    proposal.proposal_boxes = RotatedBoxes([[40, 32, 30, 8, 110], [41, 32, 30, 8, 22]])
    proposal.objectness_logits = torch.zeros(2)
    sampled = model.roi_heads.label_and_sample_proposals([proposal], [target])[0]
    by_angle = dict(
        zip(sampled.proposal_boxes.tensor[:, 4].tolist(), sampled.gt_classes.tolist(), strict=True)
    )
    assert by_angle == {110.0: 2, 22.0: 1, 20.0: 1}
    assert isinstance(sampled.gt_boxes, RotatedBoxes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["MODEL.RPN.BBOX_REG_WEIGHTS", (1.0, 1.0, 1.0, 1.0)], "five weights"),
        (["MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS", (1.0, 1.0, 1.0, 1.0)], "five weights"),
        (["MODEL.ANCHOR_GENERATOR.NAME", "DefaultAnchorGenerator"], "RotatedAnchorGenerator"),
        (["MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlignV2"], "ROIAlignRotated"),
        (["MODEL.RPN.BBOX_REG_LOSS_TYPE", "giou"], "smooth_l1"),
        (["MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "giou"], "smooth_l1"),
        (["MODEL.MASK_ON", True], "MASK_ON"),
        (["MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES", True], "TRAIN_ON_PRED_BOXES"),
    ],
)
def test_configs_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_model(rotated_config(*options))


def test_upright_ground_truth_in_a_rotated_model_and_the_reverse():
    from tests.support.tiny_model import tiny_input

    rotated, upright = build_model(rotated_config()), build_model(tiny_config())
    with pytest.raises(ValueError, match="RRPN"):
        rotated([tiny_input(0)])
    with pytest.raises(ValueError, match="RRPN"):
        upright([rotated_input(0)])


def test_outlines():
    upright = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert outlines_of(upright) is upright
    boxes = torch.tensor([[50.0, 30.0, 20.0, 10.0, 0.0], [50.0, 30.0, 20.0, 10.0, 90.0]])
    expected = torch.tensor([[40.0, 25, 60, 25, 60, 35, 40, 35], [45, 40, 45, 20, 55, 20, 55, 40]])
    torch.testing.assert_close(outlines_of(boxes), expected)
