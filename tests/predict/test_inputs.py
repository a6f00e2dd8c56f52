"""One check of images for every predictor: what it takes, and a sentence for what it does not."""

import numpy as np
import pytest
import torch
from PIL import Image

from d2kit.config import get_cfg
from d2kit.engine import DefaultPredictor
from d2kit.predict import Predictor, show_result
from d2kit.predict.predictor import to_array
from d2kit.structures import Instances

RGB = np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (None, "None: cv2.imread returns it"),
        (b"\xff\xd8", "bytes: decode them"),
        (torch.zeros(1, 4, 4, 3), r"a torch tensor.*shape \(1, 4, 4, 3\)"),
        (3, "got int"),
        (object(), "got object"),
        (np.zeros((4, 4)), r"got shape \(4, 4\)"),
        (np.zeros((4, 4, 4), np.uint8), r"got shape \(4, 4, 4\)"),
        (np.zeros((0, 0, 3), np.uint8), "an empty one"),
        (np.zeros((0, 9, 3), np.uint8), "an empty one"),
        (Image.new("RGB", (0, 0)), "an empty one"),
        ((RGB / 255).astype(np.float32), r"float32 of 0\.\S+: \(image \* 255\)|float32 of 0\.\."),
        (RGB.astype(np.float16) * np.nan, "float16 of nan"),
        (RGB - 128.0, r"float64 of -128"),
        (RGB.astype(np.uint16) * 257, "got uint16"),
        (RGB.astype(np.int32) * 9, "got int32 of"),
        (RGB > 127, "got bool"),
        (RGB.astype(complex), "got complex128"),
        (RGB.astype(object), "got object"),
    ],
)
def test_what_is_no_image_is_named(given, told):
    with pytest.raises(ValueError, match=f"expected an image: an array.*{told}"):
        to_array(given, color="BGR", wanted="BGR")


@pytest.mark.parametrize("wanted", ["RGB", "BGR"])
@pytest.mark.parametrize(
    ("given", "color"),
    [(RGB, "RGB"), (RGB[:, :, ::-1], "BGR"), (RGB.astype(np.int64), "RGB")]
    + [(RGB.astype(np.float32), "RGB"), (Image.fromarray(RGB), "BGR"), ("file", "BGR")],
)
def test_the_order_is_the_one_that_is_wanted(given, color, wanted, tmp_path):
    if isinstance(given, str):
        given = tmp_path / "a.png"
        Image.fromarray(RGB).save(given)
    found = to_array(given, color=color, wanted=wanted)
    np.testing.assert_array_equal(found, RGB if wanted == "RGB" else RGB[:, :, ::-1])


@pytest.mark.parametrize("given", [None, b"", RGB > 3, np.zeros((0, 0, 3), np.uint8)])
def test_both_predictors_ask_it(given, detector):
    cfg = get_cfg()
    cfg.merge_from_file(str(detector[0]))
    cfg.MODEL.WEIGHTS = str(detector[1])
    for predictor in (DefaultPredictor(cfg), Predictor(cfg)):
        with pytest.raises(ValueError, match="expected an image"):
            predictor(given)


@pytest.mark.parametrize(
    "options",
    [
        *({"agnostic_nms": v} for v in (-1, 2, float("nan"), "0.5")),
        *({"confidence": v} for v in (float("nan"), 1.5, -1, float("inf"))),
        *({"batch_size": v} for v in (1.5, 0, -3, True, None)),
        *({"tile": v} for v in (60.5, 0, 15, float("nan"))),
        *({"tile_overlap": v} for v in (1, -0.1, float("nan"))),
        *({"device": v} for v in ("cudda", -2)),
        {"color": "rgb"},
    ],
    ids=str,
)
def test_options_have_ranges(options, detector):
    name = next(iter(options))
    told = "MODEL.DEVICE" if name == "device" else name
    with pytest.raises(ValueError, match=f"{told}: expected"):
        Predictor(*detector, **{"device": "cpu", **options})


def test_numbers_of_numpy_are_numbers(detector):
    options = {"batch_size": np.int64(2), "tile": np.int32(64), "confidence": np.float32(0.5)}
    assert Predictor(*detector, device="cpu", **options).tile == 64


def test_grey_is_drawn():
    import matplotlib.pyplot as plt

    empty = Instances((12, 16), scores=torch.zeros(0), pred_classes=torch.zeros(0).long())
    shown = show_result(RGB[:, :, 0], empty).images[0].get_array()
    np.testing.assert_array_equal(shown[:, :, 1], RGB[:, :, 0])
    plt.close("all")
