"""Names and rows of other libraries' weights: tables, real state dicts, and round trips."""

import pickle
from pathlib import Path

import pytest
import torch
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.detection.retinanet import (
    RetinaNetClassificationHead,
    RetinaNetRegressionHead,
)
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FeaturePyramidNetwork

from d2kit.checkpoint.c2_model_loading import (
    convert_file,
    convert_weights,
    recognise_naming,
)
from d2kit.checkpoint.naming import (
    MMDETECTION_RCNN,
    MMDETECTION_RETINANET,
    NAMINGS,
    TORCHVISION_RCNN,
    TORCHVISION_RETINANET,
    Template,
)
from tests.checkpoint.foreign import distinct, mmdetection_shapes, torchvision_shapes, zoo_shapes

TORCHVISION_MODELS = (
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "maskrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn_v2",
    "keypointrcnn_resnet50_fpn",
    "retinanet_resnet50_fpn",
    "retinanet_resnet50_fpn_v2",
)


def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    ("template", "name", "values"),
    [
        (
            "res{s+2}.{b}.conv{k}.*",
            "res4.11.conv2.weight",
            {"s": 2, "b": 11, "k": 2, "*": "weight"},
        ),
        ("res{s+2}.{b}.*", "res1.0.weight", None),
        ("x.{i*3+1}.*", "x.7.bias", {"i": 2, "*": "bias"}),
        ("x.{i*3+1}.*", "x.6.bias", None),
        ("x.{i}.*", "x.6.norm.bias", None),
        ("plain", "plain", {}),
        ("a.b", "aXb", None),
    ],
)
def test_templates(template, name, values):
    assert Template(template).read(name) == values
    if values is not None:
        assert Template(template).write(values) == name


@pytest.mark.parametrize(
    ("naming", "ours", "theirs"),
    [
        (
            TORCHVISION_RCNN,
            "backbone.bottom_up.res4.5.conv2.norm.running_var",
            "backbone.body.layer3.5.bn2.running_var",
        ),
        (TORCHVISION_RCNN, "backbone.fpn_lateral3.bias", "backbone.fpn.inner_blocks.1.0.bias"),
        (TORCHVISION_RETINANET, "backbone.fpn_output3.bias", "backbone.fpn.layer_blocks.0.0.bias"),
        (TORCHVISION_RCNN, "roi_heads.box_head.fc2.weight", "roi_heads.box_head.fc7.weight"),
        (
            TORCHVISION_RCNN,
            "roi_heads.keypoint_head.conv_fcn8.weight",
            "roi_heads.keypoint_head.14.weight",
        ),
        (
            TORCHVISION_RETINANET,
            "head.bbox_subnet.6.bias",
            "head.regression_head.conv.3.0.bias",
        ),
        (
            MMDETECTION_RCNN,
            "roi_heads.box_head.2.fc1.weight",
            "roi_head.bbox_head.2.shared_fcs.0.weight",
        ),
        (MMDETECTION_RCNN, "backbone.fpn_output5.weight", "neck.fpn_convs.3.conv.weight"),
        (MMDETECTION_RETINANET, "backbone.top_block.p7.weight", "neck.fpn_convs.4.conv.weight"),
        (MMDETECTION_RETINANET, "head.cls_subnet.4.bias", "bbox_head.cls_convs.2.conv.bias"),
    ],
)
def test_names_both_ways(naming, ours, theirs):
    assert list(naming.to_theirs({ours: torch.ones(1)})) == [theirs]
    assert list(naming.to_ours({theirs: torch.ones(1)})) == [ours]


# Module, where it stands, its parameter until torchvision 0.12 (in the released files) and now.
OLD_TORCHVISION = [
    (
        FeaturePyramidNetwork([2, 2], 2),
        "backbone.fpn.",
        "inner_blocks.1.bias",
        "inner_blocks.1.0.bias",
    ),
    (
        FeaturePyramidNetwork([2, 2], 2),
        "backbone.fpn.",
        "layer_blocks.0.bias",
        "layer_blocks.0.0.bias",
    ),
    (RPNHead(2, 3), "rpn.head.", "conv.bias", "conv.0.0.bias"),
    (MaskRCNNHeads(2, (2, 2), 1), "roi_heads.mask_head.", "mask_fcn2.bias", "1.0.bias"),
    (
        RetinaNetClassificationHead(2, 1, 1),
        "head.classification_head.",
        "conv.4.bias",
        "conv.2.0.bias",
    ),
    (RetinaNetRegressionHead(2, 1), "head.regression_head.", "conv.6.bias", "conv.3.0.bias"),
]


@pytest.mark.parametrize(("module", "place", "old", "new"), OLD_TORCHVISION)
def test_old_names_of_torchvision(module, place, old, new):
    naming = TORCHVISION_RETINANET if place.startswith("head") else TORCHVISION_RCNN
    target = list(naming.to_ours({place + new: torch.ones(1)}))
    assert list(naming.to_ours({place + old: torch.ones(1)})) == target
    assert list(naming.to_theirs({target[0]: torch.ones(1)})) == [place + new]
    module.load_state_dict({old: torch.full((2,), 7.0)}, strict=False)  # torchvision's own upgrade
    assert module.state_dict()[new].tolist() == [7, 7]


@pytest.mark.parametrize("name", TORCHVISION_MODELS)
def test_every_name_of_torchvision_is_known(name):
    """There and back: all names return; only rows of background, which nothing reads, are lost."""
    theirs = distinct(torchvision_shapes(name))
    naming = recognise_naming(theirs)
    assert naming in NAMINGS["torchvision"]
    ours = convert_weights(theirs, "detectron2")
    foreign = [n for n in ours if n in theirs and not n.startswith("roi_heads.box_predictor.")]
    assert not foreign
    back = convert_weights(ours, "torchvision")
    assert set(back) == set(theirs)
    for key, value in theirs.items():
        background = {"bbox_pred": 4, "mask_fcn_logits": 1}.get(key.split(".")[-2], 0)
        if not (background and key.startswith("roi_heads")):
            assert torch.equal(back[key], value), key
            continue
        assert torch.equal(back[key][background:], value[background:]), key
        assert not back[key][:background].any()


@pytest.mark.parametrize(
    ("name", "zoo"),
    [
        ("faster_rcnn_r50_fpn", "COCO-Detection/faster_rcnn_R_50_FPN_3x"),
        ("mask_rcnn_r50_fpn", "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x"),
        ("retinanet_r50_fpn", "COCO-Detection/retinanet_R_101_FPN_3x"),
        ("cascade_rcnn_r50_fpn", "Misc/cascade_mask_rcnn_R_50_FPN_3x"),
        ("cascade_mask_rcnn_r101_fpn", "Misc/cascade_mask_rcnn_R_50_FPN_3x"),
    ],
)
def test_every_name_of_mmdetection_is_known(name, zoo):
    shapes = mmdetection_shapes(name)
    theirs = distinct(shapes)
    ours = convert_weights(theirs, "d2kit")
    assert recognise_naming(theirs) in NAMINGS["mmdetection"]
    heads = {n for n in zoo_shapes(zoo) if not n.startswith("backbone.bottom_up")}
    if "mask" not in name:
        heads = {n for n in heads if "mask_head" not in n}
    assert {n for n in ours if not n.startswith("backbone.bottom_up")} == heads
    back = convert_weights(ours, "mmdetection")
    assert set(back) == set(theirs)
    copies = ("roi_head.mask_head.0.", "roi_head.mask_head.1.")  # of the last stage's masks
    for key, value in theirs.items():
        last = key.replace("mask_head.0", "mask_head.2").replace("mask_head.1", "mask_head.2")
        assert torch.equal(back[key], theirs[last] if key.startswith(copies) else value), key


ROUND_TRIPS = {
    "COCO-Detection/faster_rcnn_R_50_FPN_3x": ("torchvision", "mmdetection"),
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x": ("torchvision", "mmdetection"),
    "COCO-Detection/retinanet_R_50_FPN_3x": ("torchvision", "mmdetection"),
    "COCO-Detection/retinanet_R_101_FPN_3x": ("torchvision", "mmdetection"),
    "COCO-Keypoints/keypoint_rcnn_R_50_FPN_3x": ("torchvision",),
    "Misc/cascade_mask_rcnn_R_50_FPN_3x": ("mmdetection",),
}


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_round_trip_keeps_every_tensor(name):
    """Detectron2 -> torchvision -> d2kit -> MMDetection -> d2kit."""
    start = distinct(zoo_shapes(name))
    weights = start
    for library in ROUND_TRIPS[name]:
        theirs = convert_weights(weights, library)
        assert recognise_naming(theirs) in NAMINGS[library]
        weights = convert_weights(theirs, "d2kit")
        assert set(weights) == set(start)
    assert same({k: weights[k] for k in start}, start)


def test_round_trip_through_files(tmp_path):
    start = {
        name: torch.randn(shape).to(torch.float16 if "fc1" in name else torch.float32)
        for name, shape in zoo_shapes("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x").items()
        if "bottom_up.res" not in name and "fc1.weight" not in name
    }
    arrays = {name: value.numpy() for name, value in start.items()}
    (tmp_path / "zoo.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "zoo"}))
    steps = ["torchvision.pth", "d2kit.safetensors", "mmdetection.pth", "detectron2.pkl"]
    source = tmp_path / "zoo.pkl"
    for step in steps:
        said = convert_file(source, tmp_path / step, Path(step).stem)
        assert str(source) in said
        source = tmp_path / step
    with open(source, "rb") as file:
        result = pickle.load(file)["model"]
    assert set(result) == set(start)
    for name, value in start.items():
        assert result[name].dtype == arrays[name].dtype
        assert result[name].tobytes() == value.numpy().tobytes()
    mmdetection = torch.load(tmp_path / "mmdetection.pth", weights_only=True)
    assert set(mmdetection) == {"meta", "state_dict"}
    assert "rpn.head.cls_logits.weight" in torch.load(
        tmp_path / "torchvision.pth", weights_only=True
    )


def test_converted_weights_load_strictly_into_torchvision():
    shapes = zoo_shapes("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x")
    theirs = convert_weights(
        {k: torch.empty(s, device="meta") for k, s in shapes.items()}, "torchvision"
    )
    expected = torchvision_shapes("maskrcnn_resnet50_fpn", num_classes=81)
    counters = {k for k in expected if k.endswith("num_batches_tracked")}
    assert {k: tuple(v.shape) for k, v in theirs.items()} == {
        k: v for k, v in expected.items() if k not in counters
    }


def test_rows_of_predictors():
    rows = {
        "rpn.head.cls_logits.weight": torch.ones(3, 1, 1, 1),
        "roi_heads.box_predictor.cls_score.bias": torch.tensor([9.0, 1, 2]),
        "roi_heads.box_predictor.bbox_pred.bias": torch.arange(12.0),
        "roi_heads.mask_predictor.mask_fcn_logits.bias": torch.tensor([9.0, 1, 2]),
    }
    ours = convert_weights(rows, "d2kit")
    assert ours["roi_heads.box_predictor.cls_score.bias"].tolist() == [1, 2, 9]
    assert ours["roi_heads.box_predictor.bbox_pred.bias"].tolist() == list(range(4, 12))
    assert ours["roi_heads.mask_head.predictor.bias"].tolist() == [1, 2]


@pytest.mark.parametrize(("sizes", "expected"), [(3, [0, 3, 6, 1, 4, 7, 2, 5, 8]), (1, [0, 1, 2])])
def test_rows_of_anchors(sizes, expected):
    """Theirs: ratio, then size; ours: size, then ratio. One class, so that a row is an anchor."""
    anchors = 3 * sizes
    theirs = {
        "bbox_head.retina_cls.weight": torch.ones(anchors, 1),
        "bbox_head.retina_cls.bias": torch.arange(float(anchors)),
        "bbox_head.retina_reg.bias": torch.arange(4.0 * anchors),
    }
    ours = convert_weights(theirs, "d2kit")
    assert ours["head.cls_score.bias"].tolist() == expected
    assert ours["head.bbox_pred.bias"].view(-1, 4)[:, 0].tolist() == [4 * i for i in expected]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"roi_heads.box_predictor.bbox_pred.bias": torch.ones(4)}, "class-agnostic"),
        ({"backbone.bottom_up.stem.conv1.weight": None}, "only detectors with ResNet, FPN"),
        ({"roi_heads.box_head.0.fc1.weight": torch.ones(1, 1)}, "no equal of 1 weights"),
    ],
)
def test_what_has_no_equal_is_refused(change, message):
    weights = distinct(zoo_shapes("COCO-Detection/faster_rcnn_R_50_FPN_3x")) | change
    weights = {k: v for k, v in weights.items() if v is not None}
    with pytest.raises(ValueError, match=message):
        convert_weights(weights, "torchvision")


def test_unknown_orders_libraries_and_suffixes(tmp_path):
    odd = {
        "bbox_head.retina_cls.weight": torch.ones(6, 1),
        "bbox_head.retina_reg.bias": torch.ones(24),
    }
    with pytest.raises(ValueError, match="6 anchors per position"):
        convert_weights(odd, "d2kit")
    with pytest.raises(KeyError, match="nearest: .*torchvision"):
        convert_weights({}, "torchvison")
    with pytest.raises(ValueError, match="expected the suffix"):
        convert_file(tmp_path / "a.pth", tmp_path / "b.onnx", "d2kit")


def test_biases_before_a_norm():
    theirs = distinct(torchvision_shapes("retinanet_resnet50_fpn_v2"))
    ours = convert_weights(theirs, "d2kit")
    assert not ours["head.cls_subnet.3.bias"].any()
    ours["backbone.bottom_up.stem.conv1.weight"] = torch.ones(1, 1)
    ours["head.bbox_subnet.3.bias"] = torch.ones(256)
    with pytest.raises(ValueError, match=r"head\.bbox_subnet\.3\.weight has a bias"):
        convert_weights(ours, "torchvision")
