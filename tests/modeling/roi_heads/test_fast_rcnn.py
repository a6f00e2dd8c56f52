import math

import pytest
import torch
import torch.nn.functional as F

from d2kit.layers import ShapeSpec, batched_nms
from d2kit.modeling.box_regression import Box2BoxTransform
from d2kit.modeling.proposal_generator.proposal_utils import suppress
from d2kit.modeling.roi_heads.fast_rcnn import (
    FastRCNNOutputLayers,
    _log_classification_stats,
    fast_rcnn_inference,
)
from d2kit.modeling.roi_heads.keypoint_head import keypoint_rcnn_inference, keypoint_rcnn_loss
from d2kit.modeling.roi_heads.mask_head import mask_rcnn_inference, mask_rcnn_loss
from d2kit.structures import Boxes, Instances
from d2kit.utils.events import EventStorage

CLASSES = 3
SIZES = [(60, 80), (50, 40)]


def predictor(**changes):
    torch.manual_seed(0)
    options = {
        "box2box_transform": Box2BoxTransform((10.0, 10.0, 5.0, 5.0)),
        "num_classes": CLASSES,
        **changes,
    }
    return FastRCNNOutputLayers(ShapeSpec(channels=6), **options)


def proposals(*counts, targets=True):
    rng = torch.Generator().manual_seed(3)
    result = []
    for count, size in zip(counts, SIZES, strict=True):
        corner = torch.rand(count, 2, generator=rng) * 30
        boxes = torch.cat([corner, corner + 5 + torch.rand(count, 2, generator=rng) * 30], 1)
        one = Instances(size, proposal_boxes=Boxes(boxes))
        if targets:
            one.gt_classes = torch.randint(0, CLASSES + 1, (count,), generator=rng)
            one.gt_boxes = Boxes(boxes + 1.0)
        result.append(one)
    return result


def predictions(head, rows, scale=3.0):
    rng = torch.Generator().manual_seed(4)
    deltas = torch.randn(rows, head.bbox_pred.out_features, generator=rng)
    return torch.randn(rows, CLASSES + 1, generator=rng) * scale, deltas


def same(a, b):
    assert len(a) == len(b)
    torch.testing.assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor)
    torch.testing.assert_close(a.scores, b.scores)
    assert torch.equal(a.pred_classes, b.pred_classes)


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("counts", [(0, 0), (0, 1), (30, 20)])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 2.0])
def test_decoding_the_candidates_equals_decoding_everything(agnostic, sigmoid, counts, threshold):
    head = predictor(
        cls_agnostic_bbox_reg=agnostic,
        use_sigmoid_ce=sigmoid,
        test_score_thresh=threshold,
        test_topk_per_image=12,
    )
    inputs, outputs = proposals(*counts), predictions(head, sum(counts))
    instances, rows = head.inference(outputs, inputs)
    expected, expected_rows = fast_rcnn_inference(
        head.predict_boxes(outputs, inputs),
        head.predict_probs(outputs, inputs),
        SIZES,
        threshold,
        0.5,
        12,
    )
    for got, wanted, row, wanted_row in zip(instances, expected, rows, expected_rows, strict=True):
        same(got, wanted)
        assert torch.equal(row, wanted_row)
        assert len(got) <= 12
        assert (got.scores > threshold).all()
        assert (got.scores.diff() <= 0).all()
        assert got.pred_boxes.inside_box(got.image_size, 1e-3).all()


def test_a_subclass_that_redefines_predict_boxes_is_obeyed():
    class Shifted(FastRCNNOutputLayers):
        def predict_boxes(self, predictions, proposals):
            return tuple(b * 0 + 7 for b in super().predict_boxes(predictions, proposals))

    head = Shifted(
        ShapeSpec(channels=6), box2box_transform=Box2BoxTransform((1, 1, 1, 1)), num_classes=CLASSES
    )
    instances, _ = head.inference(predictions(head, 3), proposals(1, 2))
    assert (instances[0].pred_boxes.tensor == 7).all()


@pytest.mark.parametrize("topk", [-1, 0, 1, 3, 50])
@pytest.mark.parametrize("overlap", [0.1, 1.0])
def test_looking_at_the_best_candidates_first_changes_nothing(topk, overlap):
    rng = torch.Generator().manual_seed(0)
    corner = torch.rand(300, 2, generator=rng) * 100 * (1.1 - overlap)
    boxes = torch.cat([corner, corner + 20], dim=1)
    scores = torch.randint(0, 50, (300,), generator=rng) / 50  # with ties
    classes = torch.randint(0, 2, (300,), generator=rng)
    expected = batched_nms(boxes, scores, classes, 0.5)
    expected = expected if topk < 0 else expected[:topk]
    got, rows = suppress(
        boxes, scores, classes, torch.arange(300), (200, 200), nms_thresh=0.5, topk=topk
    )
    assert rows.tolist() == expected.tolist()
    assert torch.equal(got.scores, scores[expected])


def test_non_finite_boxes_are_dropped():
    head = predictor(test_score_thresh=0.0)
    scores, deltas = predictions(head, 4)
    deltas[1] = math.nan
    instances, rows = head.inference((scores, deltas), proposals(4, 0))
    assert len(instances[0]) > 0
    assert 1 not in rows[0].tolist()
    assert torch.isfinite(instances[0].pred_boxes.tensor).all()


@pytest.mark.parametrize("agnostic", [False, True])
def test_losses_follow_their_definition(agnostic):
    head = predictor(cls_agnostic_bbox_reg=agnostic, loss_weight={"loss_box_reg": 2.0})
    inputs = proposals(12, 8)
    scores, deltas = predictions(head, 20)
    losses = head.losses((scores, deltas), inputs)
    classes = torch.cat([p.gt_classes for p in inputs])
    location = 0.0
    row = 0
    for p in inputs:
        for k in range(len(p)):
            c = int(p.gt_classes[k])
            if c < CLASSES:
                source, target = p.proposal_boxes.tensor[k : k + 1], p.gt_boxes.tensor[k : k + 1]
                wanted = head.box2box_transform.get_deltas(source, target)[0]
                column = 0 if agnostic else 4 * c
                location += (deltas[row, column : column + 4] - wanted).abs().sum().item()
            row += 1
    assert losses["loss_cls"].item() == pytest.approx(F.cross_entropy(scores, classes).item())
    assert losses["loss_box_reg"].item() == pytest.approx(2.0 * location / 20, rel=1e-5)


@pytest.mark.parametrize("counts", [(0, 0), (1, 0), (5, 3)])
@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("kind", ["smooth_l1", "giou", "diou", "ciou"])
def test_losses_are_finite_and_reach_every_weight(counts, sigmoid, kind):
    head = predictor(use_sigmoid_ce=sigmoid, box_reg_loss_type=kind)
    outputs = head(torch.randn(sum(counts), 6))
    losses = head.losses(outputs, proposals(*counts))
    sum(losses.values()).backward()
    assert all(torch.isfinite(v) for v in losses.values())
    assert all(torch.isfinite(p.grad).all() for p in head.parameters())


def test_only_background_has_no_box_loss():
    head = predictor()
    inputs = proposals(4, 2, targets=False)
    for p in inputs:
        p.gt_classes = torch.full((len(p),), CLASSES)
    losses = head.losses(head(torch.randn(6, 6)), inputs)
    sum(losses.values()).backward()
    assert losses["loss_box_reg"] == 0
    assert losses["loss_cls"] > 0
    assert (head.bbox_pred.weight.grad == 0).all()


def test_sigmoid_loss_sums_over_classes_and_averages_over_regions():
    head = predictor(use_sigmoid_ce=True)
    scores, _ = predictions(head, 5)
    classes = torch.tensor([0, 1, 2, 3, 3])
    target = F.one_hot(classes, 4)[:, :3].float()
    expected = F.binary_cross_entropy_with_logits(scores[:, :3], target, reduction="sum") / 5
    assert head.sigmoid_cross_entropy_loss(scores, classes).item() == pytest.approx(expected.item())
    assert head.cls_score.bias.sigmoid()[0].item() == pytest.approx(0.01)


WEIGHTS = [4.0, 0.5, 1.5]


@pytest.mark.parametrize("background", [None, 0.25])
@pytest.mark.parametrize("sigmoid", [False, True])
def test_class_weights_follow_their_formula(sigmoid, background):
    """The weighted mean over regions, of the loss and of its gradient."""
    given = WEIGHTS if background is None else [*WEIGHTS, background]
    head = predictor(use_sigmoid_ce=sigmoid, class_weights=given)
    inputs = proposals(12, 8)
    scores, deltas = predictions(head, 20)
    classes = torch.cat([p.gt_classes for p in inputs])
    assert set(classes.tolist()) == {0, 1, 2, 3}
    found, wanted = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    losses = head.losses((found, deltas), inputs)
    total = count = torch.zeros(())
    for row, c in enumerate(classes.tolist()):
        weight = [*WEIGHTS, 1.0 if background is None else background][c]
        if sigmoid:
            signs = torch.tensor([1.0 if k == c else -1.0 for k in range(CLASSES)])
            one = -F.logsigmoid(signs * wanted[row, :CLASSES]).sum()
        else:
            one = -wanted[row].log_softmax(0)[c]
        total, count = total + weight * one, count + weight
    expected = total / count
    losses["loss_cls"].backward()
    expected.backward()
    torch.testing.assert_close(losses["loss_cls"], expected)
    torch.testing.assert_close(found.grad, wanted.grad)
    plain = predictor(use_sigmoid_ce=sigmoid).losses((scores, deltas), inputs)
    assert not torch.isclose(plain["loss_cls"], expected)
    assert torch.equal(plain["loss_box_reg"], losses["loss_box_reg"])


def rare_recall(weights, sigmoid):
    """Train on regions of which 3 in 100 are of class 2; return the recalls of the classes."""
    rng = torch.Generator().manual_seed(0)
    centres = torch.randn(CLASSES + 1, 6, generator=rng) * 0.8
    shares = torch.tensor([0.3, 0.1, 0.03, 0.57])
    head = predictor(class_weights=weights, use_sigmoid_ce=sigmoid)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.5, momentum=0.9)

    def draw(count):
        classes = shares.multinomial(count, replacement=True, generator=rng)
        return centres[classes] + torch.randn(count, 6, generator=rng), classes

    for _ in range(100):
        features, classes = draw(500)
        boxes = Boxes(torch.tensor([[2.0, 2.0, 9.0, 9.0]]).repeat(500, 1))
        regions = Instances((20, 20), proposal_boxes=boxes, gt_boxes=boxes, gt_classes=classes)
        optimizer.zero_grad()
        head.losses(head(features), [regions])["loss_cls"].backward()
        optimizer.step()
    features, classes = draw(20000)
    found = head(features)[0][:, : CLASSES + (not sigmoid)].argmax(dim=1)
    return [(found[classes == c] == c).float().mean().item() for c in range(CLASSES)]


@pytest.mark.parametrize("sigmoid", [False, True])
def test_a_rare_class_is_found_more_often_with_weights(sigmoid):
    balanced = [0.43 / (3 * share) for share in (0.3, 0.1, 0.03)]
    without, with_weights = rare_recall(None, sigmoid), rare_recall(balanced, sigmoid)
    assert with_weights[2] > without[2] + 0.1
    assert with_weights[0] > 0.5  # the frequent one is not given up


@pytest.mark.parametrize("sigmoid", [False, True])
def test_weights_of_one_change_nothing_and_their_scale_neither(sigmoid):
    inputs = proposals(12, 8)
    values = []
    for weights in (None, [], [1.0] * 3, [7.0] * 4):
        head = predictor(use_sigmoid_ce=sigmoid, class_weights=weights)
        values.append(head.losses(predictions(head, 20), inputs)["loss_cls"].item())
        assert "class_weights" not in head.state_dict()
    assert values[1] == values[0]
    assert values[2:] == pytest.approx([values[0]] * 2, rel=1e-6)


@pytest.mark.parametrize("counts", [(0, 0), (3, 2)])
@pytest.mark.parametrize("sigmoid", [False, True])
def test_a_batch_without_any_weight_has_no_loss(sigmoid, counts):
    head = predictor(use_sigmoid_ce=sigmoid, class_weights=[1.0, 1.0, 1.0, 0.0])
    inputs = proposals(*counts)
    for p in inputs:
        p.gt_classes = torch.full((len(p),), CLASSES)
    loss = head.losses(head(torch.randn(sum(counts), 6)), inputs)["loss_cls"]
    loss.backward()
    assert loss == 0


@pytest.mark.parametrize(
    "weights",
    [[1.0], [1.0] * 5, [1.0, -1.0, 1.0], [1.0, float("nan"), 1.0], [0.0] * 4, "balance"],
)
def test_wrong_class_weights_are_named(weights):
    with pytest.raises(ValueError, match=r"CLASS_WEIGHTS needs one weight .* 3 classes"):
        predictor(class_weights=weights)


@pytest.mark.parametrize("sigmoid", [False, True])
def test_balanced_weights_that_nobody_computed_serve_inference_alone(sigmoid):
    head = predictor(use_sigmoid_ce=sigmoid, class_weights="balanced")
    outputs = head(torch.randn(5, 6))
    assert len(head.inference(outputs, proposals(3, 2))[0]) == 2
    with pytest.raises(ValueError, match="computed from the training set by DefaultTrainer"):
        head.losses(outputs, proposals(3, 2))


def test_federated_loss_scores_the_present_and_some_drawn_classes():
    weights = torch.tensor([1.0, 0.0, 1.0])
    head = predictor(
        use_sigmoid_ce=True,
        use_fed_loss=True,
        get_fed_loss_cls_weights=lambda: weights,
        fed_loss_num_classes=2,
    )
    classes = torch.tensor([0, 0])
    scored = head.get_fed_loss_classes(classes, 2, CLASSES, weights)
    assert sorted(scored.tolist()) == [0, 2]  # class 1 has weight 0
    scores, _ = predictions(head, 2)
    target = F.one_hot(classes, 4)[:, :3].float()
    every = F.binary_cross_entropy_with_logits(scores[:, :3], target, reduction="none")
    expected = every[:, [0, 2]].sum() / 2
    assert head.sigmoid_cross_entropy_loss(scores, classes).item() == pytest.approx(expected.item())
    assert head.get_fed_loss_classes(torch.tensor([0, 1, 2]), 2, CLASSES, weights).tolist() == [
        0,
        1,
        2,
    ]
    with pytest.raises(ValueError, match="get_fed_loss_cls_weights"):
        predictor(use_sigmoid_ce=True, use_fed_loss=True)
    with pytest.raises(ValueError, match="one weight per class, 3"):
        predictor(
            use_sigmoid_ce=True, use_fed_loss=True, get_fed_loss_cls_weights=lambda: weights[:2]
        )


@pytest.mark.parametrize("agnostic", [False, True])
def test_boxes_of_the_ground_truth_class(agnostic):
    head = predictor(cls_agnostic_bbox_reg=agnostic)
    inputs, outputs = proposals(3, 2), predictions(head, 5)
    boxes = head.predict_boxes_for_gt_classes(outputs, inputs)
    every = head.predict_boxes(outputs, inputs)
    for p, chosen, all_boxes in zip(inputs, boxes, every, strict=True):
        for k, c in enumerate(p.gt_classes.clamp(max=CLASSES - 1).tolist()):
            column = 0 if agnostic else 4 * c
            assert torch.equal(chosen[k], all_boxes[k, column : column + 4])


def test_statistics():
    scores = torch.eye(4)[[0, 1, 3, 3]]
    with EventStorage() as storage:
        _log_classification_stats(scores, torch.tensor([0, 2, 3, 1]), "box")
        _log_classification_stats(scores[:0], torch.tensor([], dtype=torch.int64), "none")
        latest = {k: v[0] for k, v in storage.latest().items()}
    assert latest == pytest.approx(
        {"box/cls_accuracy": 0.5, "box/fg_cls_accuracy": 1 / 3, "box/false_negative": 1 / 3}
    )


def test_a_batch_of_no_images_has_losses_of_zero_and_no_results():
    """Lists of no images, as semi-supervised training passes where nothing was labelled."""
    transform = Box2BoxTransform((1.0, 1.0, 1.0, 1.0))
    layers = FastRCNNOutputLayers(8, box2box_transform=transform, num_classes=3)
    predictions = layers(torch.zeros(0, 8))
    losses = layers.losses(predictions, [])
    sum(losses.values()).backward()
    assert {name: loss.item() for name, loss in losses.items()} == {
        "loss_cls": 0,
        "loss_box_reg": 0,
    }
    assert layers.inference(predictions, []) == ([], [])
    assert mask_rcnn_inference(torch.zeros(0, 3, 28, 28), []) is None
    assert float(mask_rcnn_loss(torch.zeros(0, 3, 28, 28), [])) == 0
    assert keypoint_rcnn_inference(torch.zeros(0, 17, 56, 56), []) is None
    assert float(keypoint_rcnn_loss(torch.zeros(0, 17, 56, 56), [], None)) == 0
