import numpy as np
import pytest
import torch

from d2kit.layers.rotated_boxes import matched_iou_rotated
from d2kit.structures import (
    Boxes,
    BoxMode,
    RotatedBoxes,
    pairwise_iou,
    pairwise_iou_rotated,
)
from tests.support.reference_files import reference_path


def random_boxes(n, seed):
    g = torch.Generator().manual_seed(seed)
    centre, size = torch.rand(n, 2, generator=g) * 20, torch.rand(n, 2, generator=g) * 15 + 0.5
    return torch.cat([centre, size, (torch.rand(n, 1, generator=g) - 0.5) * 720], dim=1)


def test_reference_values():
    vectors = np.load(reference_path("ops/rotated_boxes.npz"))
    a, b = RotatedBoxes(vectors["a"]), RotatedBoxes(vectors["b"])
    expected = torch.as_tensor(vectors["pairwise_iou_rotated"])
    torch.testing.assert_close(pairwise_iou_rotated(a, b), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(a.area(), torch.as_tensor(vectors["area"]), rtol=1e-5, atol=0)
    assert a.inside_box((80, 100)).tolist() == vectors["inside"].tolist()
    xyxy = BoxMode.convert(vectors["a"], BoxMode.XYWHA_ABS, BoxMode.XYXY_ABS)
    np.testing.assert_allclose(xyxy, vectors["to_xyxy"], rtol=1e-4)


def test_upright_boxes_agree_with_axis_aligned():
    rotated = random_boxes(40, 0)
    rotated[:, 4] = torch.randint(-2, 3, (40,)) * 180.0
    centre, half = rotated[:, :2], rotated[:, 2:4] / 2
    boxes = Boxes(torch.cat([centre - half, centre + half], dim=1))
    found = pairwise_iou_rotated(RotatedBoxes(rotated), RotatedBoxes(rotated))
    torch.testing.assert_close(found, pairwise_iou(boxes, boxes), rtol=1e-4, atol=1e-6)


def test_iou_against_counted_points():
    a, b = random_boxes(30, 1), random_boxes(30, 2)
    ticks = torch.arange(-15, 35, 0.1) + 0.05
    y, x = torch.meshgrid(ticks, ticks, indexing="ij")

    def inside(box):
        angle = box[4] * torch.pi / 180
        dx, dy = x - box[0], y - box[1]
        u, v = dx * angle.cos() - dy * angle.sin(), dx * angle.sin() + dy * angle.cos()
        return (u.abs() <= box[2] / 2) & (v.abs() <= box[3] / 2)

    for p, q, iou in zip(a, b, matched_iou_rotated(a, b), strict=True):
        one, two = inside(p), inside(q)
        counted = ((one & two).sum() / (one | two).sum()).item()
        assert iou.item() == pytest.approx(counted, abs=0.02)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([5, 5, 4, 2, 30], [5, 5, 4, 2, 30], 1.0),  # every edge coincides
        ([5, 5, 4, 2, 30], [5, 5, 2, 4, 120], 1.0),  # the same box, written otherwise
        ([5, 5, 4, 2, 30], [5, 5, 4, 2, 210], 1.0),
        ([5, 5, 4, 4, 0], [9, 5, 4, 4, 0], 0.0),  # touching from outside
        ([5, 5, 4, 4, 0], [6, 5, 2, 4, 0], 0.5),  # inside, three edges shared
        ([5, 5, 4, 4, 0], [5, 5, 2, 2, 0], 0.25),
        ([5, 5, 4, 4, 0], [50, 5, 2, 2, 0], 0.0),
        ([5, 5, 0, 4, 0], [5, 5, 4, 4, 0], 0.0),  # no area
        ([5, 5, 0, 0, 0], [5, 5, 0, 0, 0], 0.0),
        ([5, 5, 2, 2, 0], [5, 5, 2, 2, 45], 0.70710678),  # a square and its eighth turn
    ],
)
def test_special_positions(a, b, expected):
    for turn in (0.0, 17.0, 90.0):
        first, second = torch.tensor([a]).float(), torch.tensor([b]).float()
        # turning both about the same centre changes nothing; touching edges become inexact
        angle = torch.tensor(turn * torch.pi / 180)
        for box in (first, second):
            dx, dy = box[:, 0] - 5, box[:, 1] - 5
            x = dx * angle.cos() + dy * angle.sin() + 5
            y = -dx * angle.sin() + dy * angle.cos() + 5
            box[:, 0], box[:, 1], box[:, 4] = x, y, box[:, 4] + turn
        for p, q in ((first, second), (second, first)):
            assert matched_iou_rotated(p, q).item() == pytest.approx(expected, abs=1e-4)


def test_iou_does_not_depend_on_order_or_large_offset():
    a, b = random_boxes(20, 3), random_boxes(25, 4)
    iou = pairwise_iou_rotated(RotatedBoxes(a), RotatedBoxes(b))
    assert iou.shape == (20, 25)
    assert ((iou >= 0) & (iou <= 1)).all()
    swapped = pairwise_iou_rotated(RotatedBoxes(b), RotatedBoxes(a))
    torch.testing.assert_close(iou, swapped.T, rtol=0, atol=1e-5)
    shift = torch.tensor([4096.0, 4096.0, 0, 0, 0])
    moved = pairwise_iou_rotated(RotatedBoxes(a + shift), RotatedBoxes(b + shift))
    torch.testing.assert_close(iou, moved, rtol=0, atol=2e-3)  # centres are float32
    assert pairwise_iou_rotated(RotatedBoxes([]), RotatedBoxes(b)).shape == (0, 25)


def test_normalize_and_clip():
    boxes = RotatedBoxes([[5, 5, 20, 4, 360.5], [5, 5, 20, 4, 45], [5, 5, 2, 2, 190]])
    boxes.normalize_angles()
    assert boxes.tensor[:, 4].tolist() == pytest.approx([0.5, 45, -170])
    boxes.clip((30, 10))
    assert boxes.tensor[0].tolist() == pytest.approx([5, 5, 10, 4, 0.5])
    assert boxes.tensor[1].tolist() == [5, 5, 20, 4, 45]


@pytest.mark.parametrize(
    ("box", "factors", "expected"),
    [
        ([10, 20, 4, 2, 0], (2, 3), [20, 60, 8, 6, 0]),
        ([10, 20, 4, 2, 90], (2, 3), [20, 60, 12, 4, 90]),
        ([10, 20, 4, 2, 30], (2, 2), [20, 40, 8, 4, 30]),
    ],
)
def test_scale(box, factors, expected):
    boxes = RotatedBoxes([box])
    boxes.scale(*factors)
    assert boxes.tensor[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_container():
    boxes = RotatedBoxes(random_boxes(4, 5))
    assert len(boxes[1]) == 1
    assert len(RotatedBoxes.cat([boxes, boxes[:2]])) == 6
    assert isinstance(boxes[:2], RotatedBoxes)
    assert isinstance(boxes, Boxes)
    assert RotatedBoxes.cat([]).tensor.shape == (0, 5)
    assert len(list(boxes)) == 4
    assert boxes.nonempty(threshold=100.0).tolist() == [False] * 4
    assert torch.equal(boxes.clone().to("cpu").get_centers(), boxes.tensor[:, :2])
    with pytest.raises(ValueError, match=r"expected shape \(R, 5\)"):
        RotatedBoxes(torch.zeros(2, 4))
