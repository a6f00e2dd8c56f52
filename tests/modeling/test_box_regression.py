import numpy as np
import pytest
import torch

from d2kit.modeling.box_regression import (
    _DEFAULT_SCALE_CLAMP,
    Box2BoxTransform,
    Box2BoxTransformLinear,
    Box2BoxTransformRotated,
    _dense_box_regression_loss,
)
from d2kit.structures import Boxes
from tests.support.reference_files import reference_path

PLAIN = Box2BoxTransform((10.0, 10.0, 5.0, 5.0))
ROTATED = Box2BoxTransformRotated((10.0, 10.0, 5.0, 5.0, 1.0))
LINEAR = Box2BoxTransformLinear(normalize_by_size=True)


@pytest.fixture
def ref() -> dict[str, torch.Tensor]:
    arrays = np.load(reference_path("ops/box_regression.npz"))
    return {name: torch.from_numpy(arrays[name]) for name in arrays}


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_plain_equals_the_reference(ref):
    close(PLAIN.get_deltas(ref["src"], ref["dst"]), ref["deltas"])
    close(PLAIN.apply_deltas(ref["big"], ref["src"]), ref["applied"])


def test_linear_equals_the_reference(ref):
    target = ref["src"] + torch.tensor([-1.0, -2.0, 3.0, 4.0])
    close(LINEAR.get_deltas(ref["src"], target), ref["linear_deltas"])
    close(LINEAR.apply_deltas(ref["big"][:, :4].abs(), ref["src"]), ref["linear_applied"])


def test_rotated_equals_the_reference(ref):
    close(ROTATED.get_deltas(ref["rsrc"], ref["rdst"]), ref["rotated_deltas"], 1e-4)
    close(ROTATED.apply_deltas(ref["rotated_deltas"], ref["rsrc"]), ref["rotated_applied"], 1e-4)


@pytest.mark.parametrize(
    "transform",
    [
        PLAIN,
        Box2BoxTransform((1.0, 2.0, 3.0, 4.0)),
        LINEAR,
        Box2BoxTransformLinear(normalize_by_size=False),
    ],
)
@pytest.mark.parametrize("count", [0, 1, 50])
def test_applying_inverts_encoding(transform, count):
    generator = torch.Generator().manual_seed(0)
    src = torch.rand(count, 4, generator=generator).cumsum(1) * 50 + torch.tensor([0, 0, 9, 9])
    grow = torch.rand(count, 4, generator=generator) * torch.tensor([-5, -5, 5, 5])
    deltas = transform.get_deltas(src, src + grow)
    close(transform.apply_deltas(deltas, src), src + grow, 1e-4)


@pytest.mark.parametrize("weights", [(10, 10, 5, 5, 1), (1, 2, 3, 4, 5)])
def test_rotated_applying_inverts_encoding(weights):
    transform = Box2BoxTransformRotated(weights)
    generator = torch.Generator().manual_seed(0)
    src, dst = torch.rand(2, 20, 5, generator=generator) * 100 + 5
    dst[:, 4] -= 180  # differences of up to 280 degrees are taken the short way round
    close(transform.apply_deltas(transform.get_deltas(src, dst), src), dst, 1e-3)


def test_scale_is_clamped():
    box = torch.tensor([[0.0, 0.0, 16.0, 16.0]])
    out = Box2BoxTransform((1, 1, 1, 1)).apply_deltas(torch.tensor([[0.0, 0.0, 99.0, 99.0]]), box)
    close(out[0, 2:] - out[0, :2], torch.tensor([1000.0, 1000.0]), 1e-3)
    assert pytest.approx(np.log(1000 / 16)) == _DEFAULT_SCALE_CLAMP


def test_half_precision_deltas_are_applied_in_float32():
    box = torch.tensor([[1000.0, 1000.0, 1003.0, 1003.0]])
    out = PLAIN.apply_deltas(torch.zeros(1, 4, dtype=torch.bfloat16), box)
    assert out.dtype == torch.float32
    close(out, box)


def test_leading_dimensions_broadcast():
    boxes = torch.tensor([[0.0, 0, 4, 4], [2, 2, 8, 9]])
    deltas = torch.randn(3, 2, 8)
    out = PLAIN.apply_deltas(deltas, boxes)
    for i in range(3):
        close(out[i], PLAIN.apply_deltas(deltas[i], boxes))


ANCHORS = [
    Boxes(torch.tensor([[0.0, 0, 10, 10], [5, 5, 15, 25]])),
    torch.tensor([[8.0, 8, 20, 16]]),
]
TARGETS = [
    torch.tensor([[1.0, 1, 9, 12], [6, 4, 16, 26], [0, 0, 0, 0]]),  # the last one is degenerate
    torch.tensor([[1.0, 2, 11, 10], [5, 5, 15, 25], [8, 9, 18, 16]]),
]
FOREGROUND = torch.tensor([[True, True, False], [False, False, True]])


def predictions() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    deltas = 0.3 * torch.randn(2, 3, 4, generator=generator)
    return [d.requires_grad_() for d in deltas.split([2, 1], dim=1)]


@pytest.mark.parametrize("kind", ["smooth_l1", "giou", "diou", "ciou"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_dense_loss_is_the_sum_over_the_foreground(kind, beta):
    pred = predictions()
    loss = _dense_box_regression_loss(ANCHORS, PLAIN, pred, TARGETS, FOREGROUND, kind, beta)
    grads = torch.autograd.grad(loss, pred)
    grad = torch.cat(grads, dim=1)
    assert torch.isfinite(grad).all()
    assert (grad[~FOREGROUND] == 0).all()
    assert (grad[FOREGROUND] != 0).any(dim=1).all()

    anchors = torch.cat([ANCHORS[0].tensor, ANCHORS[1]])
    expected = 0.0
    for image, anchor in FOREGROUND.nonzero().tolist():
        one = [torch.cat(pred, dim=1)[image : image + 1, anchor : anchor + 1]]
        target = [TARGETS[image][anchor : anchor + 1]]
        mask = torch.ones(1, 1, dtype=torch.bool)
        box = [anchors[anchor : anchor + 1]]
        expected += _dense_box_regression_loss(box, PLAIN, one, target, mask, kind, beta).item()
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_smooth_l1_value():
    pred = [torch.zeros(1, 1, 4)]
    anchors, target = [torch.tensor([[0.0, 0, 10, 10]])], [torch.tensor([[1.0, 0, 11, 10]])]
    mask = torch.ones(1, 1, dtype=torch.bool)
    loss = _dense_box_regression_loss(anchors, PLAIN, pred, target, mask)
    assert loss.item() == pytest.approx(1.0)  # dx = 1 / 10, weight 10


def test_giou_value_of_apart_boxes():
    pred = [torch.zeros(1, 1, 4)]
    anchors, target = [torch.tensor([[0.0, 0, 1, 1]])], [torch.tensor([[2.0, 0, 3, 1]])]
    mask = torch.ones(1, 1, dtype=torch.bool)
    loss = _dense_box_regression_loss(anchors, PLAIN, pred, target, mask, "giou")
    assert loss.item() == pytest.approx(1 + 1 / 3, rel=1e-5)  # hull 3, union 2


def test_no_foreground_gives_zero_and_zero_gradient():
    for kind in ("smooth_l1", "giou", "diou", "ciou"):
        pred = predictions()
        none = torch.zeros_like(FOREGROUND)
        loss = _dense_box_regression_loss(ANCHORS, PLAIN, pred, TARGETS, none, kind)
        loss.backward()
        assert loss.item() == 0
        assert all((p.grad == 0).all() for p in pred)


def test_unknown_loss_is_refused():
    with pytest.raises(ValueError, match="BBOX_REG_LOSS_TYPE"):
        _dense_box_regression_loss(ANCHORS, PLAIN, predictions(), TARGETS, FOREGROUND, "l2")
