import numpy as np
import pytest
import torch

from d2kit.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from d2kit.data import transforms as T  # noqa: N812
from d2kit.data.annotations import transform_rotated_annotations
from d2kit.data.datasets import convert_to_coco_json, load_coco_json
from d2kit.data.detection_utils import (
    annotations_to_instances,
    transform_instance_annotations,
)
from d2kit.structures import BoxMode, RotatedBoxes
from tests.support.rotated import paint, rotated_config, rotated_scene


def record(tmp_path, seed=0, objects=3):
    import cv2

    image, boxes, classes = rotated_scene(seed, objects, size=(60, 90))
    path = tmp_path / f"{seed}.png"
    cv2.imwrite(str(path), image)
    return {
        "file_name": str(path),
        "image_id": seed,
        "height": 60,
        "width": 90,
        "annotations": [
            {"bbox": box.tolist(), "bbox_mode": BoxMode.XYWHA_ABS, "category_id": int(c)}
            for box, c in zip(boxes, classes, strict=True)
        ],
    }


def mapper(*augmentations):
    return DatasetMapper(
        True, augmentations=list(augmentations), image_format="BGR", use_rotated_boxes=True
    )


@pytest.mark.parametrize(
    "augmentation",
    [
        T.RandomFlip(1.0, horizontal=True, vertical=False),
        T.RandomFlip(1.0, horizontal=False, vertical=True),
        T.RandomRotation([50, 50], sample_style="range"),
        T.RandomRotation([-120, -120], expand=False, sample_style="range"),
        T.Resize((120, 180)),
        T.FixedSizeCrop((100, 100)),
    ],
)
def test_boxes_follow_the_pixels(tmp_path, augmentation):
    """The pixels inside the transformed box are those of the object."""
    given = record(tmp_path, seed=4, objects=1)
    out = mapper(augmentation)(given)
    boxes = out["instances"].gt_boxes
    assert isinstance(boxes, RotatedBoxes)
    image = out["image"].numpy().transpose(1, 2, 0)
    bright = image.max(axis=2) > 200
    box = boxes.tensor[0].numpy()
    mask = np.zeros((*image.shape[:2], 3), np.uint8)
    paint(mask, box, 1)
    both = np.logical_and(bright, mask[..., 0])
    assert both.sum() / np.logical_or(bright, mask[..., 0]).sum() > 0.8
    assert given["annotations"][0]["bbox_mode"] == BoxMode.XYWHA_ABS  # the record is left alone


def test_rotated_boxes_survive_a_json_file(tmp_path):
    given = [record(tmp_path, seed, objects=seed) for seed in range(3)]
    DatasetCatalog.register("rotated_json", lambda: given)
    MetadataCatalog.get("rotated_json").thing_classes = ["a", "b"]
    try:
        path = tmp_path / "rotated.json"
        convert_to_coco_json("rotated_json", path)
        for before, after in zip(given, load_coco_json(path, "/", None), strict=True):
            assert len(before["annotations"]) == len(after["annotations"])
            for a, b in zip(before["annotations"], after["annotations"], strict=True):
                assert b["bbox_mode"] == BoxMode.XYWHA_ABS
                np.testing.assert_allclose(b["bbox"], a["bbox"], atol=1e-3)
    finally:
        DatasetCatalog.remove("rotated_json")
        MetadataCatalog.remove("rotated_json")


def test_upright_boxes_get_angle_0_and_crowds_are_left_out(tmp_path):
    given = record(tmp_path, objects=0)
    given["annotations"] = [
        {"bbox": [10, 20, 30, 10], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1},
        {
            "bbox": [10, 20, 30, 10, 5],
            "bbox_mode": BoxMode.XYWHA_ABS,
            "category_id": 1,
            "iscrowd": 1,
        },
    ]
    instances = mapper()(given)["instances"]
    assert instances.gt_boxes.tensor.tolist() == [[25, 25, 30, 10, 0]]
    assert instances.gt_classes.tolist() == [1]


@pytest.mark.parametrize(("box", "kept"), [([20, 20, 10, 4, 30], 1), ([80, 20, 10, 4, 30], 0)])
def test_boxes_out_of_sight_are_dropped(tmp_path, box, kept):
    given = record(tmp_path, objects=0)
    given["annotations"] = [{"bbox": box, "bbox_mode": BoxMode.XYWHA_ABS, "category_id": 0}]
    out = mapper(T.CropTransform(0, 0, 40, 40))(given)
    assert len(out["instances"]) == kept
    assert out["instances"].gt_boxes.tensor.shape == (kept, 5)


def test_the_config_of_a_rotated_model_asks_for_rotated_boxes(tmp_path):
    cfg = rotated_config("INPUT.MIN_SIZE_TRAIN", (60,))
    instances = DatasetMapper(cfg, is_train=True)(record(tmp_path))["instances"]
    assert isinstance(instances.gt_boxes, RotatedBoxes)
    assert len(instances) == 3


def test_transforms_without_a_rule_are_named():
    extent = T.ExtentTransform((0, 0, 10, 10), (5, 5))
    with pytest.raises(ValueError, match="ExtentTransform"):
        transform_rotated_annotations([], T.TransformList([T.NoOpTransform(), extent]))
    with pytest.raises(ValueError, match="masks"):
        DatasetMapper(
            True,
            augmentations=[],
            image_format="BGR",
            use_instance_mask=True,
            use_rotated_boxes=True,
        )


@pytest.mark.parametrize("kind", ["rle", "mask", "polygon"])
@pytest.mark.parametrize("size", [(64, 64), (20, 30)])
def test_masks_are_empty_in_the_border_of_a_large_scale_jitter(kind, size):
    from pycocotools import mask as mask_util

    mask = np.zeros((40, 60), np.uint8, order="F")
    mask[10:20, 10:30] = 1
    segmentation = {
        "rle": mask_util.encode(mask),
        "mask": mask.astype(bool),
        "polygon": [[10, 10, 30, 10, 30, 20, 10, 20]],
    }[kind]
    augmented = T.AugInput(np.zeros((40, 60, 3), np.uint8))
    transforms = T.AugmentationList([T.ResizeScale(1.0, 1.0, 40, 60), T.FixedSizeCrop(size)])(
        augmented
    )
    annotation = {
        "bbox": [10, 10, 20, 10],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": 0,
        "segmentation": segmentation,
    }
    transform_instance_annotations(annotation, transforms, size)
    masks = annotations_to_instances([annotation], size, mask_format="bitmask").gt_masks.tensor[0]
    assert augmented.image.shape[:2] == tuple(masks.shape) == size
    expected = torch.zeros(size, dtype=torch.bool)
    x0, y0 = transforms.apply_coords(np.array([[10.0, 10.0]]))[0].astype(int)
    expected[max(y0, 0) : y0 + 10, max(x0, 0) : x0 + 20] = True
    assert torch.equal(masks, expected)
