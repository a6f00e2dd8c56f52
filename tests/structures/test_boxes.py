import numpy as np
import pytest
import torch

from d2kit.structures import (
    Boxes,
    BoxMode,
    pairwise_intersection,
    pairwise_ioa,
    pairwise_iou,
    pairwise_point_box_distance,
)
from d2kit.structures.boxes import matched_pairwise_iou
from tests.support.reference_files import reference_path


@pytest.fixture(scope="module")
def vectors():
    return np.load(reference_path("ops/boxes.npz"))


def close(actual, expected):
    expected = torch.as_tensor(expected)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_reference_values(vectors):
    a, b = Boxes(vectors["a"]), Boxes(vectors["b"])
    close(pairwise_iou(a, b), vectors["pairwise_iou"])
    close(pairwise_ioa(a, b), vectors["pairwise_ioa"])
    close(a.area(), vectors["area"])
    close(a.get_centers(), vectors["centers"])
    close(a.inside_box((60, 70), 5), vectors["inside"])
    close(a.nonempty(20.0), vectors["nonempty"])
    points = torch.as_tensor(vectors["points"])
    close(pairwise_point_box_distance(points, b), vectors["pairwise_point_box_distance"])
    a.clip((60, 70))
    close(a.tensor, vectors["clipped"])


def test_matched_iou_is_the_diagonal(vectors):
    a, b = Boxes(vectors["a"])[:9], Boxes(vectors["b"])
    close(matched_pairwise_iou(a, b), pairwise_iou(a, b).diagonal())
    with pytest.raises(ValueError, match="12 and 9"):
        matched_pairwise_iou(Boxes(vectors["a"]), b)


def test_overlap_of_nothing_is_zero():
    point, box = Boxes([[1, 1, 1, 1]]), Boxes([[0, 0, 2, 2]])
    assert pairwise_iou(point, point).tolist() == [[0.0]]
    assert pairwise_ioa(box, point).tolist() == [[0.0]]
    assert pairwise_intersection(box, Boxes([[1, 1, 5, 5]])).tolist() == [[1.0]]
    assert pairwise_iou(Boxes([]), box).shape == (0, 1)


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (1, [[4, 5, 6, 7]]),
        (-1, [[8, 9, 10, 11]]),
        (slice(0, 2), [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (torch.tensor([True, False, True]), [[0, 1, 2, 3], [8, 9, 10, 11]]),
        (torch.tensor([2, 2]), [[8, 9, 10, 11], [8, 9, 10, 11]]),
        ([0], [[0, 1, 2, 3]]),
    ],
)
def test_indexing(item, expected):
    boxes = Boxes(torch.arange(12).view(3, 4))
    assert boxes[item].tensor.tolist() == expected


def test_container():
    boxes = Boxes([[0, 0, 1, 2]])
    assert len(boxes) == 1
    assert [b.tolist() for b in boxes] == [[0, 0, 1, 2]]
    both = Boxes.cat([boxes, boxes.clone()])
    both.scale(2, 3)
    assert both.tensor.tolist() == [[0, 0, 2, 6]] * 2
    assert boxes.tensor.tolist() == [[0, 0, 1, 2]]
    assert Boxes.cat([]).tensor.shape == (0, 4)
    assert boxes.to("cpu").device == torch.device("cpu")
    assert "Boxes(tensor" in repr(boxes)


def test_clip_leaves_the_tensor_it_was_given():
    tensor = torch.tensor([[-1.0, -1.0, 9.0, 9.0]])
    boxes = Boxes(tensor)
    boxes.clip((5, 6))
    assert boxes.tensor.tolist() == [[0, 0, 6, 5]]
    assert tensor.tolist() == [[-1, -1, 9, 9]]


@pytest.mark.parametrize("wrong", [torch.zeros(4), torch.zeros(2, 5), torch.zeros(1, 2, 4)])
def test_wrong_shape(wrong):
    with pytest.raises(ValueError, match="expected shape"):
        Boxes(wrong)


def test_box_mode_reference():
    vectors = np.load(reference_path("ops/box_mode.npz"))
    a = vectors["a"]
    xyxy, xywh = BoxMode.XYXY_ABS, BoxMode.XYWH_ABS
    np.testing.assert_allclose(BoxMode.convert(a, xyxy, xywh), vectors["xyxy_to_xywh"], rtol=1e-5)
    np.testing.assert_allclose(BoxMode.convert(a, xywh, xyxy), vectors["xywh_to_xyxy"], rtol=1e-5)
    rotated = BoxMode.convert(a.astype(np.float64), xywh, BoxMode.XYWHA_ABS)
    assert rotated.dtype == np.float64
    np.testing.assert_allclose(rotated, vectors["xywh_to_xywha"], rtol=1e-5)


@pytest.mark.parametrize("kind", [list, tuple, np.asarray, torch.tensor])
def test_box_mode_keeps_the_type(kind):
    box = kind([5.0, 6.0, 1.0, 2.0])
    converted = BoxMode.convert(box, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
    assert type(converted) is type(box)
    assert list(map(float, converted)) == [5.0, 6.0, 6.0, 8.0]
    assert list(map(float, box)) == [5.0, 6.0, 1.0, 2.0]
    back = BoxMode.convert(converted, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
    assert list(map(float, back)) == [5.0, 6.0, 1.0, 2.0]


def test_box_mode_lists_are_exact():
    assert BoxMode.convert([0.1, 0.2, 3.3, 4.4], 1, 0)[:2] == [0.1, 0.2]


def test_quarter_turn_swaps_sides():
    box = BoxMode.convert([10.0, 20.0, 8.0, 2.0, 90.0], BoxMode.XYWHA_ABS, BoxMode.XYXY_ABS)
    assert box == pytest.approx([9, 16, 11, 24])


def test_box_mode_errors():
    with pytest.raises(NotImplementedError, match="XYXY_REL"):
        BoxMode.convert([0.0, 0.0, 1.0, 1.0], BoxMode.XYXY_REL, BoxMode.XYXY_ABS)
    with pytest.raises(ValueError, match="4 numbers"):
        BoxMode.convert([0.0, 0.0, 1.0], BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
    box = [1, 2, 3, 4]
    assert BoxMode.convert(box, BoxMode.XYXY_ABS, BoxMode.XYXY_ABS) is box
