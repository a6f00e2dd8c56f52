"""`Predictor` and the two-call API: equal to the model itself, whatever the way in."""

import inspect

import cv2
import numpy as np
import pytest
import torch

import d2kit
from d2kit.engine import DefaultPredictor
from d2kit.modeling import build_model
from d2kit.modeling.facts import build_facts
from d2kit.predict import Predictor, find_images
from d2kit.predict.predictor import build_class_names, build_inference_cfg
from d2kit.predict.tiles import merge_tiles, tile_boxes
from d2kit.structures import Boxes, Instances, ROIMasks
from tests.support.tiny_model import tiny_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A config file and weights with spread-out scores."""
    folder = tmp_path_factory.mktemp("detector")
    cfg = tiny_config()
    cfg.INPUT.MIN_SIZE_TEST = 64
    cfg.INPUT.MAX_SIZE_TEST = 128
    cfg.TEST.DETECTIONS_PER_IMAGE = 10
    torch.manual_seed(0)
    model = build_model(cfg)
    with torch.no_grad():
        for parameter in model.roi_heads.parameters():
            parameter.mul_(3)
    torch.save({"model": model.state_dict()}, folder / "model.pth")
    (folder / "config.yaml").write_text(cfg.dump())
    return folder / "config.yaml", folder / "model.pth"


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    small = rng.integers(0, 255, (3, 6, 8, 3), np.uint8)
    same = [cv2.resize(image, (96, 72), interpolation=cv2.INTER_CUBIC) for image in small]
    return [*same, cv2.resize(small[0], (60, 90), interpolation=cv2.INTER_CUBIC)]


def equal(a, b):
    assert len(a) == len(b) > 0
    torch.testing.assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(a.scores, b.scores, atol=1e-4, rtol=1e-4)
    assert a.pred_classes.tolist() == b.pred_classes.tolist()
    assert (a.pred_masks != b.pred_masks).float().mean() < 1e-3


def test_result_is_that_of_default_predictor_in_any_batch(trained, pictures):
    predictor = Predictor(*trained, device="cpu", batch_size=2)
    old = DefaultPredictor(predictor.cfg)
    expected = [old(image)["instances"] for image in pictures]
    for found, one in zip(predictor(pictures), expected, strict=True):
        equal(found, one)
    equal(predictor(pictures[3]), expected[3])
    assert predictor([]) == []


def test_order_of_channels_goes_by_its_name(trained, pictures):
    bgr = Predictor(*trained, device="cpu")
    rgb = Predictor(*trained, device="cpu", color="RGB")
    equal(bgr(pictures[0]), rgb(pictures[0][:, :, ::-1]))
    with pytest.raises(ValueError, match="expected 'RGB' or 'BGR', got 'rgb'"):
        Predictor(*trained, device="cpu", color="rgb")


def test_files_folders_and_generators(trained, pictures, tmp_path):
    for i, image in enumerate(pictures[:3]):
        cv2.imwrite(str(tmp_path / f"{i}.png"), image)
    (tmp_path / "notes.txt").write_text("not an image")
    model = d2kit.init_detector(*trained, device="cpu")
    expected = model(pictures[:3])
    for found, one in zip(d2kit.inference_detector(model, tmp_path), expected, strict=True):
        equal(found, one)
    equal(d2kit.inference_detector(model, str(tmp_path / "1.png")), expected[1])
    taken = []
    frames = (taken.append(i) or image for i, image in enumerate(pictures[:3] * 4))
    stream = model.stream(frames)
    next(stream)
    assert len(taken) <= model.batch_size + 1, "a stream is not read to its end first"
    assert len(list(stream)) == 11


def test_missing_files_are_named(tmp_path, trained):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jpg"):
        find_images([tmp_path / "nowhere.jpg"])
    with pytest.raises(FileNotFoundError, match="no image"):
        find_images([tmp_path])
    with pytest.raises(FileNotFoundError, match="mask_rcnn_R_50_FPN_3x"):
        Predictor("COCO-InstanceSegmentation/mask_rcnn_R50_FPN_3x.yaml", device="cpu")
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        Predictor(trained[0], tmp_path / "none.pth", device="cpu")


def test_class_agnostic_nms_leaves_one_of_two_classes(trained, pictures):
    plain = Predictor(*trained, device="cpu")(pictures[0])
    single = Predictor(*trained, device="cpu", agnostic_nms=0.3)(pictures[0])
    overlaps = d2kit_iou(single.pred_boxes.tensor).fill_diagonal_(0)
    assert overlaps.max() <= 0.3
    assert 0 < len(single) < len(plain)


def d2kit_iou(boxes):
    from torchvision.ops import box_iou

    return box_iou(boxes, boxes)


def test_confidence_cuts_scores(trained, pictures):
    everything = Predictor(*trained, device="cpu")(pictures[0])
    limit = float(everything.scores.median())
    few = Predictor(*trained, device="cpu", confidence=limit)(pictures[0])
    assert len(few) < len(everything)
    assert (few.scores > limit).all()


@pytest.mark.parametrize(
    ("height", "width", "side", "overlap"),
    [(100, 100, 100, 0.2), (50, 30, 100, 0.2), (300, 1000, 128, 0.0), (301, 999, 128, 0.5)],
)
def test_tiles_cover_the_image(height, width, side, overlap):
    covered = np.zeros((height, width), int)
    tiles = tile_boxes(height, width, side, overlap)
    for x0, y0, x1, y1 in tiles:
        assert x1 - x0 == min(side, width)
        assert y1 - y0 == min(side, height)
        covered[y0:y1, x0:x1] += 1
    assert covered.min() == 1
    for a, b in zip(tiles, tiles[1:], strict=False):
        if a[1] == b[1]:
            assert a[2] - b[0] >= int(overlap * side)


def part(boxes, scores, classes=None):
    classes = torch.zeros(len(boxes), dtype=torch.int64) if classes is None else classes
    return Instances(
        (100, 100),
        pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)),
        scores=torch.tensor(scores, dtype=torch.float32),
        pred_classes=classes,
        pred_masks=ROIMasks(torch.ones(len(boxes), 4, 4)),
    )


def test_tiles_merge_to_whole_objects():
    tiles = [(0, 0, 100, 100), (60, 0, 160, 100)]
    left = part([[70, 20, 90, 40], [80, 60, 100, 80], [5, 5, 15, 15]], [0.9, 0.8, 0.7])
    right = part([[10, 20, 30, 40], [20, 60, 60, 80]], [0.6, 0.75])
    merged = merge_tiles([left, right], tiles, (100, 160), nms_threshold=0.5, most=10)
    assert merged.pred_boxes.tensor.tolist() == [
        [70, 20, 90, 40],  # seen by both tiles, once
        [80, 60, 120, 80],  # whole in the right one, cut by the left one's edge
        [5, 5, 15, 15],
    ]
    assert merged.pred_masks.shape == (3, 100, 160)
    assert 770 <= merged.pred_masks[1].sum() <= 40 * 20  # pasting rounds the corners off
    assert merged.image_size == (100, 160)
    empty = merge_tiles([part([], []), part([], [])], tiles, (100, 160), nms_threshold=0.5, most=9)
    assert len(empty) == 0


def test_one_tile_is_the_plain_result_and_many_find_more(trained, pictures):
    plain = Predictor(*trained, device="cpu")(pictures[0])
    equal(Predictor(*trained, device="cpu", tile=200)(pictures[0]), plain)
    many = Predictor(*trained, device="cpu", tile=48)(np.tile(pictures[0], (3, 3, 1)))
    assert many.image_size == (216, 288)
    assert many.pred_masks.shape[1:] == (216, 288)


def test_show_result_draws_what_is_above_the_threshold(trained, pictures, tmp_path):
    import matplotlib.pyplot as plt

    found = Predictor(*trained, device="cpu")(pictures[0])
    names = ["suv", "sedan", "van"]
    ax = d2kit.show_result(
        pictures[0], found, names, score_thr=0.0, out_file=tmp_path / "drawn.png"
    )
    shown = ax.images[0].get_array()
    assert shown.shape[:2] == pictures[0].shape[:2]
    bare = d2kit.show_result(pictures[0], found, names, score_thr=1.1).images[0].get_array()
    assert (shown != bare).any()
    np.testing.assert_array_equal(bare, pictures[0][:, :, ::-1])
    assert (tmp_path / "drawn.png").stat().st_size > 500
    plt.close("all")


def test_calls_have_the_arguments_that_mmdetection_documents(trained, pictures, tmp_path):
    """Of its versions 1 (show_result), 2 and 3."""
    documented = {
        d2kit.init_detector: ("config", "checkpoint", "device", "cfg_options"),
        d2kit.inference_detector: ("model", "imgs"),
        d2kit.show_result: ("img", "result", "class_names", "score_thr", "out_file"),
    }
    for function, names in documented.items():
        assert set(names) <= set(inspect.signature(function).parameters), function
    model = d2kit.init_detector(*trained, "cpu", cfg_options={"TEST.DETECTIONS_PER_IMAGE": 2})
    result = d2kit.inference_detector(model, iter(pictures[:2]))
    assert [len(found) for found in result] == [2, 2]
    assert model.class_names == model.CLASSES
    d2kit.show_result(pictures[0], result[0], model.CLASSES, 0.0, out_file=tmp_path / "a.jpg")
    assert (tmp_path / "a.jpg").stat().st_size > 500
    with pytest.raises(ValueError, match="detections of one image, got list"):
        d2kit.show_result(pictures[0], result)
    with pytest.raises(ValueError, match="expected 'RGB' or 'BGR', got 'rgb'"):
        d2kit.show_result(pictures[0], result[0], color="rgb")
    with pytest.raises(KeyError, match="DETECTIONS_PER_IMG"):
        d2kit.init_detector(*trained, "cpu", cfg_options={"TEST.DETECTIONS_PER_IMG": 2})


def test_shortcuts_are_lazy_and_listed():
    assert {"Predictor", "init_detector", "inference_detector", "show_result"} <= set(dir(d2kit))
    with pytest.raises(AttributeError, match="no attribute 'inti_detector'"):
        d2kit.inti_detector  # noqa: B018


@pytest.mark.parametrize(
    ("model", "names"),
    [
        ("maskrcnn_resnet50_fpn", {0: "person", 16: "cat", 89: "toothbrush"}),
        ("retinanet_resnet50_fpn", {1: "person", 17: "cat", 90: "toothbrush"}),
        ("keypointrcnn_resnet50_fpn", {0: "person"}),
    ],
)
def test_configs_of_torchvision_name_their_weights_and_classes(model, names):
    """What the first page of README counts on; nothing is downloaded."""
    cfg = build_inference_cfg(f"torchvision/{model}.yaml", None, "cpu", 0.5)
    assert f"torchvision://{model}" == cfg.MODEL.WEIGHTS
    found = build_class_names(cfg)
    assert {i: found[i] for i in names} == names
    assert len(found) == build_facts(cfg).num_classes
    cfg.MODEL.WEIGHTS = "some.pth"
    assert build_class_names(cfg)[0] == "0"


def test_a_base_config_of_torchvision_has_no_weights():
    with pytest.raises(ValueError, match="no published weights"):
        build_inference_cfg("torchvision/Base-RCNN.yaml", None, "cpu", None)


def in_precision(trained, name):
    cfg = build_inference_cfg(*trained, "cpu", None)
    cfg.TEST.DTYPE = name
    return cfg


@pytest.mark.parametrize("build", [Predictor, DefaultPredictor])
def test_half_precision_by_key(build, trained, pictures, monkeypatch, caplog):
    """Where bfloat16 is native the same objects with other digits; elsewhere float32's numbers."""
    exact = build(in_precision(trained, "float32"))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    other = build(in_precision(trained, "bfloat16"))
    assert "does not compute bfloat16 natively" in caplog.text
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    half = build(in_precision(trained, "bfloat16"))

    def scores(predictor):
        found = predictor(pictures[0])
        found = found["instances"] if build is DefaultPredictor else found
        assert found.scores.dtype == found.pred_boxes.tensor.dtype == torch.float32
        return found.scores

    a, b, c = scores(exact), scores(other), scores(half)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    torch.testing.assert_close(a.sort().values, c.sort().values, atol=0.05, rtol=0.05)
    assert not torch.is_autocast_enabled("cpu")


def test_a_predictor_with_a_constructor_of_its_own(trained, pictures):
    usual = DefaultPredictor(in_precision(trained, "float32"))

    class Own(DefaultPredictor):
        def __init__(self, other):
            self.model, self.aug, self.input_format = other.model, other.aug, other.input_format

    for part in usual.model.modules():
        vars(part).pop("_constants", None)  # as a model that was stored whole by 0.1
    equal(Own(usual)(pictures[0])["instances"], usual(pictures[0])["instances"])
