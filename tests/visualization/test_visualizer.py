import numpy as np
import pytest
import torch

from d2kit.structures import BitMasks, BoxMode, PolygonMasks
from d2kit.utils.visualizer import (
    ColorMode,
    GenericMask,
    Visualizer,
    _create_text_labels,
    _PanopticPrediction,
)
from tests.support.drawn import GREY, META, changed, detections, disc, image


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (([0, 1], [0.984, 0.5], ["a", "b"]), ["a 98%", "b 50%"]),
        (([0, 5], None, ["a"]), ["a", "5"]),
        (([1], [1.0], None), ["1 100%"]),
        ((None, [0.25], None), ["25%"]),
        (([0, 0], None, ["a"], [0, 1]), ["a", "a|crowd"]),
        ((None, None, None), None),
    ],
)
def test_text_labels(arguments, expected):
    assert _create_text_labels(*arguments) == expected


# ---------------------------------------------------------------- instances
@pytest.mark.parametrize("mode", list(ColorMode))
@pytest.mark.parametrize("count", [0, 1, 3])
def test_predictions(mode, count):
    visualizer = Visualizer(image(), META, instance_mode=mode)
    picture = visualizer.draw_instance_predictions(detections(count)).get_image()
    assert changed(picture).any() == (count > 0)


@pytest.mark.parametrize("missing", ["pred_boxes", "scores", "pred_classes", "pred_masks"])
def test_predictions_with_a_field_missing(missing):
    instances = detections()
    instances.remove(missing)
    picture = Visualizer(image(), META).draw_instance_predictions(instances).get_image()
    assert changed(picture).any()


def test_drawing_is_deterministic_and_colours_differ():
    first = Visualizer(image(), META).draw_instance_predictions(detections()).get_image()
    second = Visualizer(image(), META).draw_instance_predictions(detections()).get_image()
    assert (first == second).all()
    assert (first[40, 30] != first[50, 70]).any()


def test_class_colours():
    visualizer = Visualizer(image(), META, instance_mode=ColorMode.SEGMENTATION)
    picture = visualizer.draw_instance_predictions(detections()).get_image().astype(int)
    assert picture[40, 25].argmax() == 0  # patient: red
    assert picture[50, 60].argmax() == 1  # nurse: green


def test_grey_background():
    colourful = image()
    colourful[..., 0] = 200
    visualizer = Visualizer(colourful, META, instance_mode=ColorMode.IMAGE_BW)
    picture = visualizer.draw_instance_predictions(detections(1)).get_image()
    assert len(set(picture[58, 78].tolist())) == 1
    assert len(set(picture[30, 25].tolist())) > 1


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="'boxes': 1"):
        Visualizer(image()).overlay_instances(boxes=[[0, 0, 5, 5]], labels=["a", "b"])


def test_forms_of_masks_give_one_picture():
    square = np.zeros((60, 80), dtype=bool)
    square[10:30, 20:50] = True
    from pycocotools import mask as mask_util

    rle = mask_util.encode(np.asfortranarray(square.view(np.uint8)))
    polygon = [20.0, 10.0, 50.0, 10.0, 50.0, 30.0, 20.0, 30.0]
    forms = [
        square[None],
        torch.from_numpy(square[None]),
        BitMasks(torch.from_numpy(square[None])),
        [rle],
        [{"size": [60, 80], "counts": rle["counts"].decode()}],
        [GenericMask(square, 60, 80)],
        PolygonMasks([[np.array(polygon)]]),
        [[polygon]],
    ]
    pictures = [Visualizer(image()).overlay_instances(masks=m).get_image() for m in forms]
    for picture in pictures[1:]:
        assert (picture == pictures[0]).all()


def test_keypoints():
    names = ["nose", "left_shoulder", "right_shoulder"]
    meta = {
        "keypoint_names": names,
        "keypoint_connection_rules": [("left_shoulder", "right_shoulder", (0, 0, 255))],
    }
    points = np.array([[[40, 10, 1], [60, 30, 1], [20, 30, 1.0]]])
    picture = Visualizer(image(), meta).overlay_instances(keypoints=points).get_image()
    assert picture[30, 50].argmax() == 2
    assert picture[20, 40].argmax() == 0  # nose to the middle of the shoulders
    points[0, 0, 2] = 0
    picture = Visualizer(image(), meta).overlay_instances(keypoints=points).get_image()
    assert picture[20, 40].tolist() == [GREY] * 3


@pytest.mark.parametrize("scale", [1, 2])
def test_dataset_dict(scale):
    record = {
        "annotations": [
            {
                "bbox": [10, 10, 20, 20],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": 0,
                "segmentation": [[10, 10, 30, 10, 30, 30, 10, 30]],
            },
            {
                "bbox": [40, 30, 70, 55],
                "bbox_mode": BoxMode.XYXY_ABS,
                "category_id": 1,
                "iscrowd": 1,
                "segmentation": {"size": [60, 80], "counts": [40 * 60 + 30, 20, 4800 - 2450]},
            },
        ]
    }
    picture = Visualizer(image(), META, scale=scale).draw_dataset_dict(record).get_image()
    shown = changed(picture)
    assert shown[25 * scale, 20 * scale]
    assert shown[45 * scale, 40 * scale]
    assert not shown[5 * scale, 75 * scale]


def test_dataset_dict_without_annotations():
    assert not changed(Visualizer(image()).draw_dataset_dict({"annotations": []}).get_image()).any()


# ------------------------------------------------------------ segmentations
def test_semantic_segmentation():
    seg = np.zeros((60, 80), dtype=np.int64)
    seg[:, 40:] = 1
    seg[:5] = 255  # ignored
    picture = Visualizer(image(), META).draw_sem_seg(seg, alpha=1, draw_text=False).get_image()
    assert picture[30, 10].tolist() == [0, 0, 200]
    assert picture[30, 70].tolist() == [200, 200, 0]
    assert picture[2, 10].tolist() == [GREY] * 3


def test_panoptic_segmentation():
    seg = torch.ones(60, 80, dtype=torch.int64)
    seg[20:50, 20:50] = 9
    seg[:5] = 0
    infos = [
        {"id": 1, "isthing": False, "category_id": 1},
        {"id": 9, "isthing": True, "category_id": 0, "score": 0.9},
    ]
    prediction = _PanopticPrediction(seg, infos)
    assert (prediction.non_empty_mask() == (seg != 0).numpy()).all()
    ((mask, info),) = prediction.instance_masks()
    assert mask.sum() == 900
    assert info["id"] == 9
    assert [i["id"] for _, i in prediction.semantic_masks()] == [1]
    picture = Visualizer(image(), META).draw_panoptic_seg(seg, infos, alpha=1).get_image()
    assert picture[25, 47].argmax() == 0
    assert picture[2, 40].tolist() == [GREY] * 3


def test_panoptic_ids_without_infos():
    meta = {"label_divisor": 100, "thing_dataset_id_to_contiguous_id": {7: 1}}
    seg = np.array([[-1, 5], [101, 102]])
    prediction = _PanopticPrediction(seg, None, meta)
    assert sorted(i["id"] for _, i in prediction.instance_masks()) == [101, 102]
    assert [i["id"] for _, i in prediction.semantic_masks()] == [5]
    with pytest.raises(ValueError, match="label_divisor"):
        _PanopticPrediction(seg, None)


# -------------------------------------------------------------- GenericMask
def test_generic_mask():
    mask = disc()
    generic = GenericMask(mask, 60, 80)
    assert generic.area() == mask.sum()
    assert generic.bbox().tolist() == [28, 18, 53, 43]
    assert len(generic.polygons) == 1
    assert not generic.has_holes
    again = GenericMask(generic.polygons, 60, 80)
    assert np.logical_xor(again.mask, mask).sum() < 0.2 * mask.sum()
    mask[28:32, 38:42] = False
    assert GenericMask(mask, 60, 80).has_holes


def test_empty_generic_mask():
    generic = GenericMask(np.zeros((5, 6), dtype=bool), 5, 6)
    assert generic.polygons == []
    assert generic.bbox().tolist() == [0, 0, 0, 0]
    assert GenericMask([], 5, 6).area() == 0


@pytest.mark.parametrize(
    "mask", [np.zeros((6, 5)), {"size": [6, 5], "counts": [30]}, {"counts": [30]}, 3]
)
def test_wrong_masks(mask):
    with pytest.raises(ValueError, match="must|needs"):
        GenericMask(mask, 5, 6)
