import cv2
import numpy as np
import pytest

from d2kit.config import get_cfg
from d2kit.contrib.point_rend import ColorAugSSDTransform, add_pointrend_config
from d2kit.data import transforms as T  # noqa: N812
from d2kit.data.detection_utils import build_augmentation

NEUTRAL = {
    "brightness_delta": 0,
    **{"contrast_low": 1.0, "contrast_high": 1.0},
    **{"saturation_low": 1.0, "saturation_high": 1.0, "hue_delta": 0},
}


def image(seed=0):
    return np.random.default_rng(seed).integers(60, 190, (12, 16, 3), dtype=np.uint8)


def many(transform, count=40):
    np.random.seed(0)
    return [transform.apply_image(image()) for _ in range(count)]


@pytest.mark.parametrize("order", ["BGR", "RGB"])
def test_neutral_settings_change_nothing(order):
    for found in many(ColorAugSSDTransform(order, **NEUTRAL), 8):
        assert np.array_equal(found, image())


def test_brightness_and_contrast_are_drawn_within_their_ranges():
    shifts = [
        float((x.astype(int) - image()).mean())
        for x in many(ColorAugSSDTransform("RGB", **{**NEUTRAL, "brightness_delta": 32}))
    ]
    assert 0 in shifts  # by half a chance nothing
    assert len(set(shifts)) > 10
    assert -33 <= min(shifts) < -5 < 5 < max(shifts) <= 32
    ratios = [
        float((x / image()).mean())
        for x in many(
            ColorAugSSDTransform("RGB", **{**NEUTRAL, "contrast_low": 0.5, "contrast_high": 1.3})
        )
    ]
    assert 0.48 <= min(ratios) < 0.8
    assert 1.1 < max(ratios) <= 1.3


def test_hue_and_saturation_leave_the_value():
    settings = {**NEUTRAL, "saturation_low": 0.5, "hue_delta": 18}
    changed = 0
    for found in many(ColorAugSSDTransform("BGR", **settings)):
        value = cv2.cvtColor(found, cv2.COLOR_BGR2HSV)[..., 2].astype(int)
        wanted = cv2.cvtColor(image(), cv2.COLOR_BGR2HSV)[..., 2]
        assert np.abs(value - wanted).max() <= 1
        changed += not np.array_equal(found, image())
    assert changed > 20


def test_order_of_the_channels():
    bgr = many(ColorAugSSDTransform("BGR"), 1)[0]
    np.random.seed(0)
    rgb = ColorAugSSDTransform("RGB").apply_image(np.ascontiguousarray(image()[..., ::-1]))
    assert np.array_equal(bgr, rgb[..., ::-1])


def test_only_colours_change():
    transform = ColorAugSSDTransform("RGB")
    boxes = np.array([[1.0, 2, 3, 4]])
    assert np.array_equal(transform.apply_box(boxes), boxes)
    labels = np.ones((12, 16), dtype=np.uint8)
    assert transform.apply_segmentation(labels) is labels
    assert isinstance(transform.inverse(), T.NoOpTransform)


def test_mistakes():
    with pytest.raises(ValueError, match="'L'"):
        ColorAugSSDTransform("L")
    with pytest.raises(ValueError, match="uint8"):
        ColorAugSSDTransform("RGB").apply_image(image().astype(np.float32))


def test_key_of_the_config():
    cfg = get_cfg()
    add_pointrend_config(cfg)
    assert not any(isinstance(a, ColorAugSSDTransform) for a in build_augmentation(cfg, True))
    cfg.INPUT.COLOR_AUG_SSD = True
    assert isinstance(build_augmentation(cfg, True)[-1], ColorAugSSDTransform)
    assert not any(isinstance(a, ColorAugSSDTransform) for a in build_augmentation(cfg, False))
