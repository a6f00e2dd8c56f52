"""Annotations: transforming them, converting them to instances, and their mistakes."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

import d2kit.data.transforms as T  # noqa: N812
from d2kit.data import detection_utils as utils
from d2kit.data.annotations import decode_rle, paint_segmentation
from d2kit.structures import (
    BitMasks,
    Boxes,
    BoxMode,
    Instances,
    Keypoints,
    PolygonMasks,
    polygons_to_bitmask,
)

H, W = 40, 60
NAMES = ("nose", "left_eye", "right_eye")


def _mask():
    mask = np.zeros((H, W), np.uint8)
    mask[10:20, 10:30] = 1
    return mask


def _rle(mask, kind="str"):
    rle = coco_mask.encode(np.asfortranarray(mask))
    if kind == "list":
        flat = mask.T.reshape(-1)
        edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [2]]).astype(int)))
        return {"size": list(mask.shape), "counts": np.diff(np.r_[0, edges]).tolist()}
    return {**rle, "counts": rle["counts"].decode() if kind == "str" else rle["counts"]}


def _annotation(kind="polygon", **fields):
    kinds = {
        "polygon": [[10.0, 10, 30, 10, 30, 20, 10, 20]],
        "rle": _rle(_mask()),
        "mask": _mask(),
    }
    return {
        "id": 7,
        "bbox": [10, 10, 20, 10],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": 3,
        "iscrowd": 0,
        "segmentation": kinds[kind],
        **fields,
    }


@given(seed=st.integers(0, 10**6), kind=st.sampled_from(["str", "bytes", "list"]))
def test_rle_equals_pycocotools(seed, kind):
    rng = np.random.default_rng(seed)
    h, w = rng.integers(1, 90, 2)
    mask = (rng.random((h, w)) < rng.choice([0, 0.001, 0.1, 0.5, 1])).astype(np.uint8)
    decoded = decode_rle(_rle(mask, kind))
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, mask)


@given(seed=st.integers(0, 10**6))
def test_painted_polygons_equal_the_structures_raster(seed):
    rng = np.random.default_rng(seed)
    h, w = rng.integers(1, 70, 2)
    polygons = [np.round(rng.uniform(-20, 90, 2 * rng.integers(3, 9)), 1) for _ in range(2)]
    annotation = {"segmentation": polygons}
    canvas = np.zeros((h, w), dtype=bool)
    paint_segmentation(annotation, canvas)
    np.testing.assert_array_equal(canvas, polygons_to_bitmask(polygons, int(h), int(w)))


@pytest.mark.parametrize(
    "rle",
    [
        {"size": [10, 10], "counts": "1212"},
        {"size": [10, 10], "counts": ""},
        {"size": [10, 10], "counts": "zzzz"},
        {"size": [10, 10], "counts": "~~~~"},
        {"size": [10, 10], "counts": "\x00"},
        {"size": [10, 10], "counts": "ooooooooooooooooooooo0"},
        {"size": [10, 10], "counts": [50, -50, 100]},
        {"size": [10, 10], "counts": [50, 51]},
        {"size": [10**6, 10**6], "counts": [10**12]},
        {"size": [-1, -100], "counts": [100]},
        {"size": [10], "counts": [10]},
        {"counts": [10]},
    ],
)
def test_malformed_rle_is_refused(rle):
    with pytest.raises(ValueError, match="RLE"):
        decode_rle(rle)
    annotation = _annotation()
    annotation["segmentation"] = rle
    with pytest.raises(ValueError, match="annotation 7"):
        utils.transform_instance_annotations(annotation, T.NoOpTransform(), (H, W))


@pytest.mark.parametrize("kind", ["polygon", "rle", "mask"])
def test_transform_of_each_kind_of_segmentation(kind):
    given_annotation = _annotation(kind)
    original = copy.deepcopy(given_annotation["segmentation"])
    source = given_annotation["segmentation"]
    transforms = [T.ResizeTransform(H, W, 2 * H, 2 * W), T.HFlipTransform(2 * W)]
    result = utils.transform_instance_annotations(given_annotation, transforms, (2 * H, 2 * W))
    assert result is given_annotation
    np.testing.assert_allclose(result["bbox"], [60, 20, 100, 40])
    assert result["bbox_mode"] == BoxMode.XYXY_ABS
    assert str(source) == str(original), "what the dataset holds must not change"
    if kind == "polygon":
        (polygon,) = result["segmentation"]
        np.testing.assert_allclose(polygon, [100, 20, 60, 20, 60, 40, 100, 40])
    else:
        rows, columns = np.nonzero(result["segmentation"])
        assert (columns.min(), rows.min(), columns.max(), rows.max()) == (60, 20, 99, 39)


@pytest.mark.parametrize(
    ("mode", "box"),
    [
        (BoxMode.XYXY_ABS, [-5, 10, 80, 20]),
        (BoxMode.XYWH_ABS, [-5, 10, 85, 10]),
        (int(BoxMode.XYXY_ABS), np.array([-5, 10, 80, 20])),
        (BoxMode.XYWHA_ABS, [37.5, 15, 85, 10, 0]),
    ],
)
def test_boxes_of_every_mode_are_clipped(mode, box):
    annotation = {"bbox": box, "bbox_mode": mode, "category_id": 0}
    utils.transform_instance_annotations(annotation, T.NoOpTransform(), (H, W))
    np.testing.assert_allclose(annotation["bbox"], [0, 10, 60, 20])
    np.testing.assert_allclose(utils.get_bbox(annotation), [0, 10, 60, 20])


@given(
    boxes=st.lists(st.tuples(*[st.floats(0, 60)] * 4), min_size=1, max_size=5),
    x0=st.integers(0, 30),
    y0=st.integers(0, 20),
)
def test_boxes_stay_inside_after_a_crop(boxes, x0, y0):
    crop = T.CropTransform(x0, y0, 25, 15)
    for x, y, w, h in boxes:
        annotation = {"bbox": [x, y, w, h], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
        box = utils.transform_instance_annotations(annotation, crop, (15, 25))["bbox"]
        assert (box >= 0).all()
        assert (box <= [25, 15, 25, 15]).all()
        assert (box[2:] >= box[:2]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bbox": "abcd"}, "annotation 7"),
        ({"bbox": [1, "x", 3, 4]}, "annotation 7"),
        ({"segmentation": [["a", "b"]]}, "annotation 7.*polygon"),
        ({"segmentation": [[1, 2, 3]]}, "annotation 7.*polygon"),
        ({"segmentation": [[1, 2, 3, 4, 5, float("nan")]]}, "annotation 7.*finite"),
        ({"segmentation": [[1, 2, 3, 4, 5, 1e12]]}, "annotation 7.*1e\\+06"),
        ({"segmentation": 5}, "annotation 7.*int"),
        ({"segmentation": np.zeros((5, 5))}, r"annotation 7.*\(5, 5\).*\(40, 60\)"),
        ({"segmentation": _rle(np.ones((5, 6), np.uint8))}, r"annotation 7.*\(5, 6\)"),
    ],
)
def test_malformed_annotations_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        utils.transform_instance_annotations(_annotation(**change), T.NoOpTransform(), (H, W))


def test_annotation_without_box_is_named():
    with pytest.raises(ValueError, match="annotation 9 must have 'bbox'"):
        utils.transform_instance_annotations({"id": 9}, T.NoOpTransform(), (H, W))


KEYPOINTS = [1.0, 2, 2, 10, 20, 1, 50, 30, 2]


@pytest.mark.parametrize(
    ("transforms", "expected"),
    [
        ([T.NoOpTransform()], [[1, 2, 2], [10, 20, 1], [50, 30, 2]]),
        ([T.HFlipTransform(W)], [[59, 2, 2], [10, 30, 2], [50, 20, 1]]),
        ([T.HFlipTransform(W)] * 2, [[1, 2, 2], [10, 20, 1], [50, 30, 2]]),
        ([T.CropTransform(5, 0, 40, 40)], [[0, 0, 0], [5, 20, 1], [0, 0, 0]]),
    ],
)
def test_keypoints(transforms, expected):
    size = (40, 40) if isinstance(transforms[0], T.CropTransform) else (H, W)
    result = utils.transform_keypoint_annotations(KEYPOINTS, transforms, size, [0, 2, 1])
    np.testing.assert_allclose(result, expected)


def test_keypoints_need_flip_indices():
    with pytest.raises(ValueError, match="keypoint_hflip_indices"):
        utils.transform_keypoint_annotations(KEYPOINTS, T.HFlipTransform(W), (H, W))
    with pytest.raises(ValueError, match="3 keypoints"):
        utils.transform_keypoint_annotations(KEYPOINTS, T.HFlipTransform(W), (H, W), [0, 1])


@pytest.mark.parametrize(
    ("kinds", "mask_format", "expected"),
    [
        (["polygon", "polygon"], "polygon", PolygonMasks),
        (["polygon", "rle"], "polygon", BitMasks),
        (["mask", "polygon"], "polygon", BitMasks),
        (["rle"], "polygon", BitMasks),
        (["polygon", "rle", "mask"], "bitmask", BitMasks),
    ],
)
@pytest.mark.parametrize("transformed", [False, True])
def test_polygons_and_rle_may_be_mixed(kinds, mask_format, expected, transformed):
    annotations = [_annotation(kind) for kind in kinds]
    if transformed:
        for annotation in annotations:
            utils.transform_instance_annotations(annotation, T.NoOpTransform(), (H, W))
    instances = utils.annotations_to_instances(annotations, (H, W), mask_format)
    assert type(instances.gt_masks) is expected
    assert instances.gt_classes.tolist() == [3] * len(kinds)
    assert instances.gt_classes.dtype == torch.int64
    np.testing.assert_array_equal(instances.gt_boxes.tensor, [[10, 10, 30, 20]] * len(kinds))
    if expected is BitMasks:
        for row in instances.gt_masks.tensor:
            np.testing.assert_array_equal(row, _mask().astype(bool))


def test_no_annotation_gives_empty_instances():
    instances = utils.annotations_to_instances([], (H, W))
    assert len(instances) == 0
    assert instances.gt_boxes.tensor.shape == (0, 4)
    assert instances.gt_classes.dtype == torch.int64
    rotated = utils.annotations_to_instances_rotated([], (H, W))
    assert rotated.gt_boxes.tensor.shape == (0, 5)


@pytest.mark.parametrize(
    ("annotations", "kwargs", "message"),
    [
        ([_annotation()], {"mask_format": "rle"}, "'rle'"),
        (
            [_annotation(), {k: v for k, v in _annotation().items() if k != "segmentation"}],
            {},
            "1 of 2.*segmentation",
        ),
        (
            [_annotation("rle", segmentation=_rle(np.ones((3, 3), np.uint8)))],
            {"mask_format": "bitmask"},
            r"\(3, 3\)",
        ),
        ([_annotation(keypoints=[1, 2, 2]), _annotation(keypoints=KEYPOINTS)], {}, "keypoints"),
    ],
)
def test_annotations_that_do_not_fit_are_refused(annotations, kwargs, message):
    with pytest.raises(ValueError, match=message):
        utils.annotations_to_instances(annotations, (H, W), **kwargs)


def test_bit_masks_beyond_the_limit_are_refused():
    annotations = [_annotation("polygon")] * 1000
    size = (3000, 3000)
    instances = utils.annotations_to_instances(annotations, size, "polygon")
    assert len(instances.gt_masks) == 1000
    with pytest.raises(ValueError, match="1000 bit masks of 3000x3000.*polygons"):
        utils.annotations_to_instances(annotations, size, "bitmask")


def test_keypoints_become_instances():
    annotation = _annotation(keypoints=KEYPOINTS)
    instances = utils.annotations_to_instances([annotation, annotation], (H, W))
    assert isinstance(instances.gt_keypoints, Keypoints)
    assert instances.gt_keypoints.tensor.shape == (2, 3, 3)


def test_an_empty_polygon_list_is_an_empty_mask():
    instances = utils.annotations_to_instances([_annotation("rle")], (H, W))
    assert instances.gt_masks.nonempty().all()
    annotation = _annotation()
    annotation["segmentation"] = []
    instances = utils.annotations_to_instances([annotation, _annotation()], (H, W), "bitmask")
    assert instances.gt_masks.nonempty().tolist() == [False, True]
    assert len(utils.filter_empty_instances(instances)) == 1


def test_rotated_annotations():
    annotation = {"bbox": [20, 20, 10, 6, 30], "category_id": 2, "id": 1}
    instances = utils.annotations_to_instances_rotated([annotation], (H, W))
    np.testing.assert_allclose(instances.gt_boxes.tensor, [[20, 20, 10, 6, 30]])
    with pytest.raises(ValueError, match="annotation 1.*5 numbers"):
        utils.annotations_to_instances_rotated([{**annotation, "bbox": [1, 2, 3, 4]}], (H, W))


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, [True, False, False]),
        ({"by_mask": False}, [True, False, True]),
        ({"by_box": False}, [True, True, False]),
        ({"by_mask": False, "box_threshold": 15.0}, [False, False, False]),
    ],
)
def test_filter_empty_instances(kwargs, expected):
    instances = Instances((H, W))
    instances.gt_boxes = Boxes(torch.tensor([[0.0, 0, 10, 10], [5, 5, 5, 9], [0, 0, 9, 9]]))
    masks = torch.zeros(3, H, W, dtype=torch.bool)
    masks[:2, 3, 3] = True
    instances.gt_masks = BitMasks(masks)
    left, keep = utils.filter_empty_instances(instances, return_mask=True, **kwargs)
    assert keep.tolist() == expected
    assert len(left) == sum(expected)
    assert len(utils.filter_empty_instances(instances, **kwargs)) == sum(expected)
    with pytest.raises(ValueError, match="both False"):
        utils.filter_empty_instances(instances, by_box=False, by_mask=False)


def test_check_image_size():
    image = np.zeros((H, W, 3), np.uint8)
    record = {"file_name": "a.jpg"}
    utils.check_image_size(record, image)
    assert (record["height"], record["width"]) == (H, W)
    with pytest.raises(utils.SizeMismatchError, match=r"a\.jpg.*60x40.*40x60"):
        utils.check_image_size({"file_name": "a.jpg", "height": W, "width": H}, image)
    with pytest.raises(ValueError, match="image 5"):
        utils.check_image_size({"image_id": 5, "height": 1}, image)


def test_transform_proposals():
    record = {
        "proposal_boxes": np.array([[0, 0, 5, 5], [10, 10, 10, 20], [-9, 2, 30, 90], [1, 1, 9, 9]]),
        "proposal_bbox_mode": BoxMode.XYXY_ABS,
        "proposal_objectness_logits": np.array([4.0, 3, 2, 1]),
    }
    utils.transform_proposals(record, (H, W), T.HFlipTransform(W), proposal_topk=2)
    assert set(record) == {"proposals"}
    np.testing.assert_allclose(
        record["proposals"].proposal_boxes.tensor, [[55, 0, 60, 5], [30, 2, 60, 40]]
    )
    assert record["proposals"].objectness_logits.tolist() == [4, 2]
    assert record["proposals"].objectness_logits.dtype == torch.float32
    untouched = {"file_name": "a.jpg"}
    utils.transform_proposals(untouched, (H, W), T.NoOpTransform(), proposal_topk=2)
    assert untouched == {"file_name": "a.jpg"}
