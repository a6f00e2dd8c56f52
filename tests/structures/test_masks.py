import json

import numpy as np
import pytest
import torch
import torchvision

from d2kit.structures import BitMasks, Boxes, PolygonMasks, ROIMasks, polygons_to_bitmask
from tests.support.reference_files import reference_path

SQUARE = [2.0, 3.0, 6.0, 3.0, 6.0, 8.0, 2.0, 8.0]


@pytest.fixture(scope="module")
def vectors():
    return np.load(reference_path("ops/masks.npz"))


@pytest.fixture(scope="module")
def polygons():
    instances = json.loads(reference_path("ops/polygons.json").read_text())
    return PolygonMasks([[np.array(p) for p in polygons] for polygons in instances])


def test_bitmask_reference(vectors):
    masks = BitMasks(vectors["bits"])
    boxes = torch.as_tensor(vectors["bits_boxes"]).clamp(0, 60)
    cropped = masks.crop_and_resize(boxes, 14)
    assert cropped.dtype == torch.bool
    assert np.array_equal(cropped, vectors["bits_crop"])
    assert np.array_equal(masks.get_bounding_boxes().tensor, vectors["bits_bbox"])


def test_polygon_reference(vectors, polygons):
    cropped = polygons.crop_and_resize(torch.as_tensor(vectors["poly_crop_boxes"]), 28)
    assert np.array_equal(cropped, vectors["poly_crop"])
    assert np.array_equal(
        BitMasks.from_polygon_masks(polygons, 60, 80).tensor, vectors["poly_bits"]
    )
    np.testing.assert_allclose(polygons.area(), vectors["poly_area"], rtol=1e-5)
    assert np.array_equal(polygons.get_bounding_boxes().tensor, vectors["poly_bbox"])


@pytest.mark.parametrize("whole_pixels", [True, False])
@pytest.mark.parametrize("size", [1, 7, 28])
def test_bitmask_crop_is_roi_align(whole_pixels, size):
    g = torch.Generator().manual_seed(size)
    masks = torch.rand(20, 40, 50, generator=g) > 0.5
    corner = torch.rand(20, 2, generator=g) * 60 - 10
    boxes = torch.cat([corner, corner + torch.rand(20, 2, generator=g) * 50 - 1], dim=1)
    if whole_pixels:
        boxes = boxes.round()
    boxes[:, 2:] = torch.maximum(boxes[:, :2], boxes[:, 2:])  # torchvision's has none below 0
    rois = torch.cat([torch.arange(20.0)[:, None], boxes], dim=1)
    expected = torchvision.ops.roi_align(masks[:, None].float(), rois, size, 1.0, 0, True)[:, 0]
    assert torch.equal(BitMasks(masks).crop_and_resize(boxes, size), expected >= 0.5)


def test_bitmask_container(vectors):
    masks = BitMasks(vectors["bits"])
    assert masks.image_size == (60, 80)
    assert len(masks) == 4
    assert len(masks[2]) == 1
    assert len(masks[1:]) == 3
    assert len(masks[torch.tensor([True, False, False, True])]) == 2
    assert len(BitMasks.cat([masks, masks[0]])) == 5
    assert len(list(masks)) == 4
    with pytest.raises(ValueError, match="gives shape"):
        masks[0, 0]
    with pytest.raises(ValueError, match="expected shape"):
        BitMasks(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="4 boxes, got 1"):
        masks.crop_and_resize(torch.zeros(1, 4), 7)
    with pytest.raises(ValueError, match="empty list"):
        BitMasks.cat([])


def test_empty_masks():
    nothing = BitMasks(torch.zeros(2, 5, 6, dtype=torch.bool))
    assert nothing.nonempty().tolist() == [False, False]
    assert nothing.get_bounding_boxes().tensor.tolist() == [[0, 0, 0, 0]] * 2
    none = BitMasks(torch.zeros(0, 5, 6))
    assert none.get_bounding_boxes().tensor.shape == (0, 4)
    assert none.crop_and_resize(torch.zeros(0, 4), 7).shape == (0, 7, 7)
    assert not nothing.crop_and_resize(torch.tensor([[1.0, 1, 1, 1]] * 2), 7).any()
    assert len(PolygonMasks([])) == 0
    assert PolygonMasks([]).get_bounding_boxes().tensor.shape == (0, 4)
    assert PolygonMasks([]).crop_and_resize(torch.zeros(0, 4), 7).shape == (0, 7, 7)
    assert BitMasks.from_polygon_masks([], 5, 6).tensor.shape == (0, 5, 6)


def test_bounding_box_of_a_mask():
    mask = torch.zeros(1, 10, 12)
    mask[0, 2, 3] = mask[0, 7, 11] = 1
    assert BitMasks(mask).get_bounding_boxes().tensor.tolist() == [[3, 2, 12, 8]]


def test_polygon_values():
    masks = PolygonMasks([[SQUARE], [SQUARE, [0.0, 0.0, 1.0, 0.0, 0.0, 1.0]], []])
    assert masks.area().tolist() == [20.0, 20.5, 0.0]
    assert masks.nonempty().tolist() == [True, True, False]
    assert masks.get_bounding_boxes().tensor.tolist()[:2] == [[2, 3, 6, 8], [0, 0, 6, 8]]
    assert polygons_to_bitmask([np.array(SQUARE)], 10, 9).sum() == 20
    box = torch.tensor([[2.0, 3.0, 6.0, 8.0]] * 3)
    assert masks.crop_and_resize(box, 4)[0].all()
    assert not masks.crop_and_resize(box, 4)[2].any()


@pytest.mark.parametrize(
    ("item", "areas"),
    [
        (0, [20]),
        (-1, [5]),
        (slice(0, 2), [20, 10]),
        ([2, 0], [5, 20]),
        (torch.tensor([True, False, True]), [20, 5]),
        (torch.tensor([1, 1]), [10, 10]),
        (np.array([2]), [5]),
        ([], []),
    ],
)
def test_polygon_indexing(item, areas):
    square = np.array(SQUARE)
    half = np.array([2.0, 3.0, 6.0, 3.0, 2.0, 8.0])
    quarter = np.array([2.0, 3.0, 4.0, 3.0, 2.0, 8.0])
    assert PolygonMasks([[square], [half], [quarter]])[item].area().tolist() == areas


def test_polygon_container():
    masks = PolygonMasks([[torch.tensor(SQUARE)], [SQUARE]])
    assert len(PolygonMasks.cat([masks, masks[1]])) == 3
    assert masks.to("cuda") is masks
    assert masks.device == torch.device("cpu")
    assert [len(p) for p in masks] == [1, 1]
    assert masks.polygons[0][0].dtype == np.float64


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.zeros((1, 6)), "list of lists"),
        ([np.zeros(6)], "instance 0"),
        ([[SQUARE], [[1.0, 2.0, 3.0, 4.0]]], r"at least 3 points.*instance 1"),
        ([[SQUARE[:7]]], "at least 3 points"),
    ],
)
def test_wrong_polygons(wrong, message):
    with pytest.raises(ValueError, match=message):
        PolygonMasks(wrong)


def test_roi_masks():
    masks = ROIMasks(torch.ones(2, 4, 4))
    boxes = Boxes([[2, 3, 6, 8], [0, 0, 1, 1]])
    bits = masks.to_bitmasks(boxes, 10, 9)
    assert bits.tensor.sum(dim=(1, 2)).tolist() == [20, 1]
    assert torch.equal(BitMasks.from_roi_masks(masks, 10, 9, boxes).tensor, bits.tensor)
    assert len(masks[:1]) == 1
    assert masks.to("cpu").device == torch.device("cpu")
    with pytest.raises(ValueError, match="gives shape"):
        masks[0]
    with pytest.raises(ValueError, match="expected shape"):
        ROIMasks(torch.zeros(3, 3))
