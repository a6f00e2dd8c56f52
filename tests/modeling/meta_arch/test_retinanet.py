import pytest
import torch

from d2kit.layers import CycleBatchNormList, ShapeSpec, sigmoid_focal_loss
from d2kit.layers.losses import focal_loss_of_labels
from d2kit.modeling.meta_arch.dense_detector import (
    DenseDetector,
    RunningCount,
    permute_to_N_HWA_K,
)
from d2kit.modeling.meta_arch.retinanet import RetinaNetHead
from d2kit.structures import Boxes, Instances
from tests.support.tiny_dense import labelled_input, tiny_dense_model


@pytest.mark.parametrize(
    ("alpha", "gamma"), [(0.25, 2.0), (-1.0, 2.0), (0.5, 0.0), (1.0, 1.5), (0.0, 2.0)]
)
def test_focal_loss_of_labels_is_the_focal_loss_of_one_hot_targets(alpha, gamma):
    rng = torch.Generator().manual_seed(0)
    logits = (torch.randn(2, 50, 4, generator=rng, dtype=torch.float64) * 4).requires_grad_()
    labels = torch.randint(-1, 5, (2, 50), generator=rng)
    targets = (labels.unsqueeze(-1) == torch.arange(4)).double()
    expected = sigmoid_focal_loss(logits, targets, alpha, gamma)[labels >= 0].sum()
    (wanted,) = torch.autograd.grad(expected, logits)
    loss = focal_loss_of_labels(logits, labels, alpha, gamma)
    (gradient,) = torch.autograd.grad(3 * loss, logits)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, 3 * wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("labels", [[-1, -1], [4, 4]])
def test_focal_loss_of_huge_logits_is_finite(labels):
    logits = torch.tensor([[[1e4, -1e4, 0.0, 88.0], [0.0, 0.0, 0.0, 0.0]]], requires_grad=True)
    loss = focal_loss_of_labels(logits, torch.tensor([labels]), 0.25, 2.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()
    assert (loss == 0) == (labels[0] == -1)


def test_focal_loss_without_anchors():
    assert focal_loss_of_labels(torch.zeros(1, 0, 3), torch.zeros(1, 0).long(), 0.25, 2) == 0


def test_running_count():
    count = RunningCount(100.0)
    assert not count.state_dict()
    assert count(torch.tensor(50)) == pytest.approx(95)
    assert count(torch.tensor(0)) == pytest.approx(0.9 * 95 + 0.1)  # none counts as one
    again = RunningCount(100.0)
    again.load_training_state(count.training_state())
    assert torch.equal(again(torch.tensor(7)), count(torch.tensor(7)))


def test_rows_per_anchor():
    x = torch.arange(2 * 6 * 2 * 3).view(2, 6, 2, 3)  # two anchors of three numbers
    rows = permute_to_N_HWA_K(x, 3)
    assert rows.shape == (2, 12, 3)
    assert rows[1, 2 * (1 * 3 + 2) + 1].tolist() == x[1, 3:, 1, 2].tolist()
    with pytest.raises(ValueError, match="N, A"):
        permute_to_N_HWA_K(x[0], 3)


def test_labels_of_anchors():
    model = tiny_dense_model("RetinaNet")
    anchors = [Boxes(torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 22.0], [50, 50, 60, 60]]))]
    gt = Instances((64, 80), gt_boxes=Boxes(torch.tensor([[0.0, 0, 10, 10]])))
    gt.gt_classes = torch.tensor([2])
    none = Instances((64, 80), gt_boxes=Boxes(torch.zeros(0, 4)), gt_classes=torch.zeros(0).long())
    labels, boxes = model.label_anchors(anchors, [gt, none])
    assert [x.tolist() for x in labels] == [[2, -1, 3], [3, 3, 3]]  # IoU 1, 10/22, 0
    assert boxes[0][0].tolist() == [0, 0, 10, 10]
    assert not boxes[1].any()


@pytest.mark.parametrize(
    ("norm", "kind"),
    [
        ("BN", CycleBatchNormList),
        ("SyncBN", CycleBatchNormList),
        ("GN", torch.nn.GroupNorm),
        ("", None),
    ],
)
def test_norm_of_the_head(norm, kind):
    head = RetinaNetHead(
        input_shape=[ShapeSpec(channels=32)] * 2,
        num_classes=3,
        num_anchors=2,
        conv_dims=[64, 32],
        norm=norm,
    )
    logits, deltas = head([torch.randn(2, 32, 4, 5), torch.randn(2, 32, 2, 3)])
    assert [tuple(x.shape) for x in logits] == [(2, 6, 4, 5), (2, 6, 2, 3)]
    assert [tuple(x.shape) for x in deltas] == [(2, 8, 4, 5), (2, 8, 2, 3)]
    assert logits[0].sigmoid().mean().item() == pytest.approx(0.01, rel=0.5)
    second = head.cls_subnet[2 if kind is None else 3]
    assert isinstance(second, torch.nn.Conv2d)
    if kind is None:
        assert not any(".1." in name for name in head.state_dict())
    else:
        assert isinstance(head.cls_subnet[1], kind)
    if kind is CycleBatchNormList:
        first, other = head.cls_subnet[1]
        assert not torch.equal(first.running_mean, other.running_mean)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["MODEL.RETINANET.IN_FEATURES", ["p2", "p4"]], "p4"),
        (["MODEL.ANCHOR_GENERATOR.SIZES", [[16, 20], [32]]], "ANCHOR_GENERATOR"),
        (["MODEL.RETINANET.PRIOR_PROB", 0.0], "PRIOR_PROB"),
        (["MODEL.RETINANET.BBOX_REG_LOSS_TYPE", "iou"], "BBOX_REG_LOSS_TYPE"),
    ],
)
def test_mistakes_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        tiny_dense_model("RetinaNet", *options)([labelled_input(0)])


def test_levels_of_different_channels():
    shapes = [ShapeSpec(channels=8), ShapeSpec(channels=16)]
    with pytest.raises(ValueError, match="channels"):
        RetinaNetHead(input_shape=shapes, num_classes=1, num_anchors=1, conv_dims=[8])


def test_a_detector_of_ones_own():
    """`DenseDetector` runs backbone and head, and orders all levels where none are named."""
    source = tiny_dense_model("RetinaNet")

    class Counting(DenseDetector):
        def forward_training(self, images, features, predictions, gt_instances):
            assert [f.shape[-1] for f in features] == [20, 10]
            return {"loss": predictions[0][0].sum() + len(gt_instances)}

        def forward_inference(self, images, features, predictions):
            boxes = Boxes(torch.tensor([[0.0, 0, 8, 8]]))
            return [Instances(size, pred_boxes=boxes) for size in images.image_sizes]

    model = Counting(source.backbone, source.head, pixel_mean=[0.0] * 3, pixel_std=[1.0] * 3)
    assert model.head_in_features == ["p2", "p3"]
    assert set(model([labelled_input(0)])) == {"loss"}
    with torch.no_grad():
        (output,) = model.eval()([{**labelled_input(0), "height": 128, "width": 160}])
    assert output["instances"].pred_boxes.tensor.tolist() == [[0, 0, 16, 16]]
    base = DenseDetector(source.backbone, source.head, pixel_mean=[0.0] * 3, pixel_std=[1.0] * 3)
    with pytest.raises(NotImplementedError, match="forward_training"):
        base([labelled_input(0)])
    with pytest.raises(NotImplementedError, match="forward_inference"):
        base.eval()([labelled_input(0)])
