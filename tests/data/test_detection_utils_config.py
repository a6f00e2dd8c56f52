"""What detection_utils makes of metadata and configs, and the crop around an instance."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import d2kit.data.transforms as T  # noqa: N812
from d2kit.config import get_cfg
from d2kit.data import MetadataCatalog
from d2kit.data import detection_utils as utils
from d2kit.structures import BoxMode

H, W = 40, 60
NAMES = ("nose", "left_eye", "right_eye")


@given(seed=st.integers(0, 1000), x=st.integers(0, 55), y=st.integers(0, 35))
def test_crop_holds_the_instances_center(seed, x, y):
    np.random.seed(seed)
    instance = {"bbox": [x, y, 5, 5], "bbox_mode": BoxMode.XYWH_ABS}
    crop = utils.gen_crop_transform_with_instance((20, 30), (H, W), instance)
    assert 0 <= crop.x0 <= x + 2.5 <= crop.x0 + 30 + 1e-9
    assert 0 <= crop.y0 <= y + 2.5 <= crop.y0 + 20 + 1e-9
    assert crop.x0 + crop.w <= W
    assert crop.y0 + crop.h <= H


@pytest.mark.parametrize(
    ("crop", "box", "message"),
    [((50, 10), [0, 0, 5, 5], "larger"), ((10, 10), [70, 0, 5, 5], "outside")],
)
def test_impossible_crops_are_named(crop, box, message):
    with pytest.raises(ValueError, match=message):
        utils.gen_crop_transform_with_instance(
            crop, (H, W), {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS}
        )


@pytest.fixture
def datasets():
    names = ["_utils_a", "_utils_b", "_utils_c"]
    for name in names[:2]:
        MetadataCatalog.get(name).set(
            keypoint_names=NAMES,
            keypoint_flip_map=(("left_eye", "right_eye"),),
            class_image_count=[{"id": 2, "image_count": 16}, {"id": 1, "image_count": 4}],
        )
    MetadataCatalog.get("_utils_c").set(
        keypoint_names=NAMES[:2], keypoint_flip_map=(("left_eye", "right_eye"),)
    )
    yield names
    for name in names:
        MetadataCatalog.pop(name)


def test_keypoint_flip_indices(datasets):
    assert list(utils.create_keypoint_hflip_indices(datasets[0])) == [0, 2, 1]
    assert list(utils.create_keypoint_hflip_indices(datasets[:2])) == [0, 2, 1]
    with pytest.raises(ValueError, match="_utils_a.*_utils_c.*keypoint_names"):
        utils.create_keypoint_hflip_indices(datasets)
    with pytest.raises(ValueError, match="right_eye"):
        utils.create_keypoint_hflip_indices("_utils_c")
    with pytest.raises(ValueError, match="no dataset"):
        utils.check_metadata_consistency("keypoint_names", [])


def test_federated_loss_weights(datasets):
    assert utils.get_fed_loss_cls_weights(datasets[0], 0.5).tolist() == [2.0, 4.0]


@pytest.mark.parametrize("build", [utils.build_augmentation, utils.build_transform_gen])
def test_build_augmentation(build):
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TRAIN = (32, 48)
    resize, flip = build(cfg, True)
    assert isinstance(resize, T.ResizeShortestEdge)
    assert tuple(resize.short_edge_length) == (32, 48)
    assert (flip.horizontal, flip.vertical) == (True, False)
    cfg.INPUT.RANDOM_FLIP = "vertical"
    assert build(cfg, True)[1].vertical
    cfg.INPUT.RANDOM_FLIP = "none"
    assert len(build(cfg, True)) == 1
    (resize,) = build(cfg, False)
    assert (resize.short_edge_length, resize.max_size) == ((800, 800), 1333)
    cfg.INPUT.RANDOM_FLIP = "both"
    with pytest.raises(ValueError, match="'both'"):
        build(cfg, True)


def test_fixed_size_and_rotation_by_config():
    cfg = get_cfg()
    cfg.INPUT.FIXED_SIZE = [224, 200]
    cfg.INPUT.ROTATION_ANGLES = [-90.0, 90.0]
    image = np.zeros((160, 240, 3), np.uint8)
    sizes, angles = set(), []
    for _ in range(20):
        sample = T.AugInput(image)
        transforms = T.AugmentationList(utils.build_augmentation(cfg, is_train=True))(sample)
        sizes.add(sample.image.shape)
        angles += [t.angle for t in transforms.transforms if hasattr(t, "angle")]
    assert sizes == {(224, 200, 3)}
    assert len(angles) == 20
    assert -90 <= min(angles) < -10 < 10 < max(angles) <= 90
    [test_time] = utils.build_augmentation(cfg, is_train=False)
    assert test_time.get_transform(image).apply_image(image).shape == (224, 200, 3)


@pytest.mark.parametrize(("key", "value"), [("FIXED_SIZE", [224]), ("ROTATION_ANGLES", [9, -9])])
def test_wrong_sizes_and_angles_are_refused(key, value):
    cfg = get_cfg()
    cfg.INPUT[key] = value
    with pytest.raises(ValueError, match=f"INPUT.{key}: expected"):
        utils.build_augmentation(cfg, is_train=True)
