"""The default mapper: what it returns, what it leaves alone, what it refuses."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

import d2kit.data.transforms as T  # noqa: N812
from d2kit.config import get_cfg
from d2kit.data import DatasetMapper, MetadataCatalog
from d2kit.data.detection_utils import SizeMismatchError
from d2kit.structures import BitMasks, BoxMode, PolygonMasks
from d2kit.structures.image_list import image_to_tensor

H, W = 40, 60


@pytest.fixture
def record(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    common = {"bbox_mode": BoxMode.XYWH_ABS, "iscrowd": 0}
    keypoints = [12.0, 12, 2, 20, 15, 1]
    return {
        "file_name": str(tmp_path / "a.png"),
        "image_id": 17,
        "height": H,
        "width": W,
        "annotations": [
            {
                "id": 1,
                "bbox": [10, 10, 20, 10],
                "category_id": 0,
                "segmentation": [[10.0, 10, 30, 10, 30, 20, 10, 20]],
                "keypoints": keypoints,
                **common,
            },
            {
                "id": 2,
                "bbox": [40, 20, 10, 15],
                "category_id": 1,
                "segmentation": [[40.0, 20, 50, 20, 50, 35, 40, 35]],
                "keypoints": keypoints,
                **common,
            },
            {
                **common,
                "id": 3,
                "bbox": [0, 0, 60, 40],
                "category_id": 1,
                "iscrowd": 1,
                "segmentation": coco_mask.encode(np.ones((H, W), np.uint8, order="F")),
            },
        ],
    }


def _mapper(*augmentations, is_train=True, **kwargs):
    kwargs = {"image_format": "RGB", "use_instance_mask": True, **kwargs}
    return DatasetMapper(is_train, augmentations=list(augmentations), **kwargs)


def test_training_sample(record):
    before = copy.deepcopy(record)
    result = _mapper(T.ResizeTransform(H, W, 80, 120), T.HFlipTransform(120))(record)
    assert str(record) == str(before), "the dataset's dict must stay as it was"
    assert set(result) == {"file_name", "image_id", "height", "width", "image", "instances"}
    assert (result["height"], result["width"]) == (H, W)
    expected = Image.open(record["file_name"]).resize((120, 80), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(result["image"], np.asarray(expected)[:, ::-1].transpose(2, 0, 1))
    assert result["image"].dtype == torch.uint8
    instances = result["instances"]
    assert instances.image_size == (80, 120)
    np.testing.assert_allclose(instances.gt_boxes.tensor, [[60, 20, 100, 40], [20, 40, 40, 70]])
    assert instances.gt_classes.tolist() == [0, 1]
    assert isinstance(instances.gt_masks, PolygonMasks)
    assert not instances.has("gt_keypoints")


def test_formats_agree(record):
    rgb = _mapper(image_format="RGB")(record)["image"]
    assert (_mapper(image_format="BGR")(record)["image"] == rgb.flip(0)).all()
    assert _mapper(image_format="L")(record)["image"].shape == (1, H, W)


def test_test_sample_has_no_ground_truth(record):
    record["sem_seg_file_name"] = "absent.png"
    result = _mapper(T.Resize((20, 30)), is_train=False)(record)
    assert set(result) == {"file_name", "image_id", "height", "width", "image"}
    assert result["image"].shape == (3, 20, 30)
    assert "annotations" in record


def test_annotations_without_masks(record):
    result = _mapper(use_instance_mask=False)(record)
    assert set(result["instances"].get_fields()) == {"gt_boxes", "gt_classes"}


def test_keypoints(record):
    record["annotations"].pop()
    mapper = _mapper(
        T.HFlipTransform(W), use_keypoint=True, keypoint_hflip_indices=np.array([1, 0])
    )
    instances = mapper(record)["instances"]
    np.testing.assert_allclose(instances.gt_keypoints.tensor[0], [[40, 15, 1], [48, 12, 2]])


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_boxes_are_recomputed_after_a_crop(record, mask_format):
    record["annotations"][0]["segmentation"] = [[10.0, 10, 30, 10, 10, 20]]  # a triangle
    crop = T.CropTransform(20, 0, 40, 40)
    loose = _mapper(crop, instance_mask_format=mask_format)(record)["instances"]
    np.testing.assert_allclose(loose.gt_boxes.tensor[0], [0, 10, 10, 20])
    tight = _mapper(crop, instance_mask_format=mask_format, recompute_boxes=True)(record)
    np.testing.assert_allclose(
        tight["instances"].gt_boxes.tensor[0],
        [0, 10, 10, 15],
        atol=0.0 + (mask_format == "bitmask"),
    )


def test_what_is_cropped_away_is_dropped(record):
    instances = _mapper(T.CropTransform(0, 0, 35, 40))(record)["instances"]
    assert instances.gt_classes.tolist() == [0]
    assert len(_mapper(T.CropTransform(0, 0, 5, 5))(record)["instances"]) == 0


def test_mixed_segmentations_give_bit_masks(record):
    mask = np.zeros((H, W), np.uint8, order="F")
    mask[20:35, 40:50] = 1
    record["annotations"][1]["segmentation"] = coco_mask.encode(mask)
    result = _mapper(T.ResizeTransform(H, W, 80, 120))(record)["instances"]
    assert isinstance(result.gt_masks, BitMasks)
    np.testing.assert_allclose(
        result.gt_masks.get_bounding_boxes().tensor, result.gt_boxes.tensor, atol=1
    )


def test_precomputed_proposals(record):
    record |= {
        "proposal_boxes": np.array([[0.0, 0, 5, 5], [1, 1, 9, 9]]),
        "proposal_bbox_mode": BoxMode.XYXY_ABS,
        "proposal_objectness_logits": np.array([2.0, 1]),
    }
    for is_train in (True, False):
        result = _mapper(T.HFlipTransform(W), is_train=is_train, precomputed_proposal_topk=1)(
            record
        )
        np.testing.assert_allclose(result["proposals"].proposal_boxes.tensor, [[55, 0, 60, 5]])
    assert "proposal_boxes" in record


def test_semantic_labels(record, tmp_path):
    labels = np.arange(H * W).reshape(H, W) % 54
    path = tmp_path / "labels.png"
    Image.fromarray(labels.astype(np.uint8)).save(path)
    record["sem_seg_file_name"] = str(path)
    result = _mapper(T.HFlipTransform(W))(record)
    assert "sem_seg_file_name" not in result
    assert result["sem_seg"].dtype == torch.int64
    np.testing.assert_array_equal(result["sem_seg"], labels[:, ::-1])
    Image.fromarray(labels[:9].astype(np.uint8)).save(path)
    with pytest.raises(SizeMismatchError, match=r"labels\.png"):
        _mapper()(record)


def test_without_annotations(record):
    del record["annotations"]
    assert "instances" not in _mapper()(record)
    record["annotations"] = []
    assert len(_mapper()(record)["instances"]) == 0


def test_mistakes_name_the_file(record):
    with pytest.raises(SizeMismatchError, match=r"a\.png"):
        _mapper()({**record, "height": H + 1})
    record["annotations"][0]["segmentation"] = [["x"]]
    with pytest.raises(ValueError, match=r"a\.png.*annotation 1"):
        _mapper()(record)
    with pytest.raises(ValueError, match="recompute_boxes"):
        _mapper(use_instance_mask=False, recompute_boxes=True)


def test_draws_follow_numpys_seed(record):
    mapper = _mapper(T.RandomCrop("relative_range", (0.3, 0.3)), T.RandomFlip())
    results = []
    for seed in (1, 1, 2):
        np.random.seed(seed)
        results.append(mapper(record)["image"])
    assert torch.equal(results[0], results[1])
    assert results[0].shape != results[2].shape


def test_from_config(record):
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.MASK_ON", True, "INPUT.MIN_SIZE_TRAIN", (20,)])
    cfg.merge_from_list(["INPUT.CROP.ENABLED", True, "INPUT.MASK_FORMAT", "bitmask"])
    mapper = DatasetMapper(cfg, is_train=True)
    assert [type(aug) for aug in mapper.augmentations.augs] == [
        T.RandomCrop,
        T.ResizeShortestEdge,
        T.RandomFlip,
    ]
    assert mapper.recompute_boxes
    result = mapper(record)
    assert min(result["image"].shape[1:]) == 20
    assert isinstance(result["instances"].gt_masks, BitMasks)
    test_mapper = DatasetMapper(cfg, False)
    assert not test_mapper.recompute_boxes
    assert test_mapper(record)["image"].shape == (3, 800, 1200)


def test_from_config_with_keypoints_and_proposals():
    MetadataCatalog.get("_mapper_a").set(keypoint_names=("l", "r"), keypoint_flip_map=(("l", "r"),))
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.KEYPOINT_ON", True, "MODEL.LOAD_PROPOSALS", True])
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = 2
    cfg.DATASETS.TRAIN = ("_mapper_a",)
    arguments = DatasetMapper.from_config(cfg, True)
    assert list(arguments["keypoint_hflip_indices"]) == [1, 0]
    assert arguments["precomputed_proposal_topk"] == 2000
    assert DatasetMapper.from_config(cfg, False)["precomputed_proposal_topk"] == 1000
    MetadataCatalog.pop("_mapper_a")


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
@pytest.mark.parametrize("channels", [None, 1, 3, 4])
@pytest.mark.parametrize("flip", [slice(None), np.s_[:, ::-1], np.s_[::-1], np.s_[..., ::-1]])
def test_image_to_tensor(dtype, channels, flip):
    shape = (5, 7) if channels is None else (5, 7, channels)
    image = np.random.default_rng(0).uniform(0, 255, shape).astype(dtype)
    view = image[flip]
    view.flags.writeable = False
    tensor = image_to_tensor(view)
    assert tensor.is_contiguous()
    expected = view if channels is not None else view[:, :, None]
    np.testing.assert_array_equal(tensor, expected.transpose(2, 0, 1))
    tensor.zero_()
    assert image.any()
