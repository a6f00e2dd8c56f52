import pytest
import torch
from torch.nn import functional as F
from torchvision import ops

from d2kit.layers.losses import (
    ciou_loss,
    diou_loss,
    giou_loss,
    sigmoid_focal_loss,
    smooth_l1_loss,
)

BOX = torch.tensor([[0.0, 0, 2, 2]])


@pytest.mark.parametrize(
    ("loss", "other", "expected"),
    [
        (giou_loss, [0, 0, 2, 2], 0.0),
        (giou_loss, [1, 0, 3, 2], 1 - 1 / 3),  # the hull is the union
        (giou_loss, [2, 2, 4, 4], 1 + 8 / 16),
        (diou_loss, [0, 0, 2, 2], 0.0),
        (diou_loss, [1, 0, 3, 2], 1 - 1 / 3 + 1 / 13),
        (diou_loss, [2, 2, 4, 4], 1 + 8 / 32),
        (ciou_loss, [0, 0, 2, 2], 0.0),
        (ciou_loss, [1, 0, 3, 2], 1 - 1 / 3 + 1 / 13),  # the same aspect ratio
    ],
)
def test_box_losses(loss, other, expected):
    other = torch.tensor([other]).float()
    assert loss(BOX, other).tolist() == pytest.approx([expected], abs=1e-5)
    assert loss(BOX, other, reduction="sum").item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("loss", "theirs"),
    [
        (giou_loss, ops.generalized_box_iou_loss),
        (diou_loss, ops.distance_box_iou_loss),
        (ciou_loss, ops.complete_box_iou_loss),
    ],
)
def test_box_losses_and_gradients_are_those_of_torchvision(loss, theirs):
    rng = torch.Generator().manual_seed(0)
    corners = torch.rand(2, 100, 2, generator=rng) * 50
    first, second = torch.cat(
        [corners, corners + 1 + torch.rand(2, 100, 2, generator=rng) * 40], dim=2
    )
    values, gradients = [], []
    for function in (loss, theirs):
        boxes = first.clone().requires_grad_()
        values.append(function(boxes, second))
        gradients += torch.autograd.grad(values[-1].sum(), boxes)
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", [giou_loss, diou_loss, ciou_loss])
def test_box_losses_wait_for_no_value(loss):
    boxes = torch.empty(5, 4, device="meta", requires_grad=True)
    loss(boxes, torch.empty(5, 4, device="meta"), reduction="sum").backward()


def test_ciou_adds_a_term_for_the_aspect_ratio():
    other = torch.tensor([[0.0, 0, 4, 1]])
    assert ciou_loss(BOX, other) > diou_loss(BOX, other) + 0.01


@pytest.mark.parametrize("loss", [giou_loss, diou_loss, ciou_loss])
def test_no_boxes(loss):
    none = torch.zeros(0, 4, requires_grad=True)
    value = loss(none, torch.zeros(0, 4), reduction="mean")
    assert value.item() == 0
    value.backward()
    with pytest.raises(ValueError, match="reduction"):
        loss(BOX, BOX, reduction="avg")


@pytest.mark.parametrize(
    ("beta", "expected"), [(0.0, [0.5, 2.0]), (1.0, [0.125, 1.5]), (4.0, [0.03125, 0.5])]
)
def test_smooth_l1(beta, expected):
    found = smooth_l1_loss(torch.tensor([0.5, -2.0]), torch.zeros(2), beta)
    assert found.tolist() == pytest.approx(expected)
    mean = smooth_l1_loss(torch.tensor([0.5, -2.0]), torch.zeros(2), beta, reduction="mean")
    assert mean.item() == pytest.approx(sum(expected) / 2)


def test_smooth_l1_shapes():
    with pytest.raises(ValueError, match="equal shapes"):
        smooth_l1_loss(torch.zeros(2), torch.zeros(3), 1.0)
    assert smooth_l1_loss(torch.zeros(0, 4), torch.zeros(0, 4), 0.0, "mean") == 0


def test_focal_loss():
    logits, target = torch.tensor([-1.0, 0.3, 2.0]), torch.tensor([0.0, 1.0, 1.0])
    plain = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    torch.testing.assert_close(sigmoid_focal_loss(logits, target, gamma=0), plain)
    p = logits.sigmoid()
    missed = torch.where(target > 0, 1 - p, p)
    weighted = plain * missed**2 * torch.where(target > 0, 0.25, 0.75)
    torch.testing.assert_close(sigmoid_focal_loss(logits, target, 0.25, 2.0), weighted)
    total = sigmoid_focal_loss(logits, target, 0.25, 2.0, reduction="sum")
    torch.testing.assert_close(total, weighted.sum())
