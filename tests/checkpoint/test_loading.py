import logging
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from d2kit.checkpoint import DetectionCheckpointer
from d2kit.checkpoint.c2_model_loading import (
    align_and_update_state_dicts,
    convert_c2_names,
    convert_torchvision_names,
)


def conv_norm(channels_in, channels_out):
    conv = nn.Conv2d(channels_in, channels_out, 1, bias=False)
    conv.norm = nn.BatchNorm2d(channels_out)
    return conv


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = conv_norm(2, 2), conv_norm(2, 2)
        self.shortcut = conv_norm(2, 2)


class Detector(nn.Module):
    """Has the names of a detector with a ResNet of one block."""

    def __init__(self, classes=3):
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.bottom_up = nn.Module()
        self.backbone.bottom_up.stem = nn.Module()
        self.backbone.bottom_up.stem.conv1 = conv_norm(3, 2)
        self.backbone.bottom_up.res2 = nn.Sequential(Block())
        self.cls_score = nn.Linear(2, classes)
        self.bbox_pred = nn.Linear(2, 4)


def ones(shape, value):
    return np.full(shape, value, dtype=np.float32)


def load(model, path, caplog=None, **kwargs):
    if caplog is None:
        return DetectionCheckpointer(model).load(str(path), **kwargs)
    with caplog.at_level(logging.INFO):
        return DetectionCheckpointer(model).load(str(path), **kwargs)


C2_BLOBS = {
    "conv1_w": ones((2, 3, 1, 1), 1),
    "res_conv1_bn_s": ones(2, 2),
    "res_conv1_bn_b": ones(2, 3),
    "res2_0_branch1_w": ones((2, 2, 1, 1), 4),
    "res2_0_branch1_bn_s": ones(2, 5),
    "res2_0_branch2a_w": ones((2, 2, 1, 1), 6),
    "res2_0_branch2b_bn_b": ones(2, 7),
    "res2_0_branch2b_bn_riv": ones(2, 8),
    "conv1_w_momentum": ones((2, 3, 1, 1), 9),
    "fc1000_w": ones((1000, 2), 9),
}


@pytest.mark.parametrize(
    ("blob", "name"),
    [
        ("conv1_w", "stem.conv1.weight"),
        ("conv1_gn_s", "stem.conv1.norm.weight"),
        ("res_conv1_bn_b", "stem.conv1.norm.bias"),
        ("res4_22_branch2c_w", "res4.22.conv3.weight"),
        ("res4_22_branch2a_bn_s", "res4.22.conv1.norm.weight"),
        ("res3_0_branch1_bn_rm", "res3.0.shortcut.norm.running_mean"),
        ("res3_0_branch2b_gn_b", "res3.0.conv2.norm.bias"),
        ("fc1000_b", "linear.bias"),
        ("pred_w", "linear.weight"),
        ("fpn_inner_res5_2_sum_w", "backbone.fpn_lateral5.weight"),
        ("fpn_inner_res4_22_sum_lateral_b", "backbone.fpn_lateral4.bias"),
        ("fpn_res2_2_sum_w", "backbone.fpn_output2.weight"),
        ("fpn_7_b", "backbone.top_block.p7.bias"),
        ("conv_rpn_fpn2_w", "proposal_generator.rpn_head.conv.weight"),
        ("conv_rpn_b", "proposal_generator.rpn_head.conv.bias"),
        ("rpn_cls_logits_fpn2_b", "proposal_generator.rpn_head.objectness_logits.bias"),
        ("rpn_bbox_pred_fpn2_w", "proposal_generator.rpn_head.anchor_deltas.weight"),
        ("fc6_w", "roi_heads.box_head.fc1.weight"),
        ("fc7_b", "roi_heads.box_head.fc2.bias"),
        ("_[mask]_fcn4_w", "roi_heads.mask_head.mask_fcn4.weight"),
        ("conv5_mask_w", "roi_heads.mask_head.deconv.weight"),
        ("conv_fcn8_b", "roi_heads.keypoint_head.conv_fcn8.bias"),
        ("kps_score_lowres_w", "roi_heads.keypoint_head.score_lowres.weight"),
        ("retnet_cls_conv_n3_fpn3_w", "head.cls_subnet.6.weight"),
        ("retnet_bbox_pred_fpn3_b", "head.bbox_pred.bias"),
        ("kps_score_w", "kps_score_w"),
    ],
)
def test_caffe2_names(blob, name):
    assert list(convert_c2_names({blob: 0})) == [name]


def test_background_of_caffe2_is_first():
    blobs = {
        "cls_score_b": np.arange(3, dtype=np.float32),
        "bbox_pred_b": np.arange(12, dtype=np.float32),
        "mask_fcn_logits_w": np.arange(3, dtype=np.float32).reshape(3, 1, 1, 1),
    }
    scores, boxes, masks = convert_c2_names(blobs).values()
    assert scores.tolist() == [1, 2, 0]
    assert boxes.tolist() == list(range(4, 12))
    assert masks.flatten().tolist() == [1, 2]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("conv1.weight", "stem.conv1.weight"),
        ("bn1.running_var", "stem.conv1.norm.running_var"),
        ("layer1.0.conv1.weight", "res2.0.conv1.weight"),
        ("layer4.2.bn3.bias", "res5.2.conv3.norm.bias"),
        ("layer2.0.downsample.0.weight", "res3.0.shortcut.weight"),
        ("layer2.0.downsample.1.weight", "res3.0.shortcut.norm.weight"),
        ("backbone.body.layer3.5.conv2.weight", "res4.5.conv2.weight"),
        ("module.fc.bias", "linear.bias"),
        ("roi_heads.box_head.fc6.weight", "roi_heads.box_head.fc6.weight"),
    ],
)
def test_torchvision_names(theirs, ours):
    assert list(convert_torchvision_names({theirs: 0})) == [ours]


def test_caffe2_pickle_goes_into_the_backbone(tmp_path, caplog):
    path = tmp_path / "R-50.pkl"
    path.write_bytes(pickle.dumps({"blobs": C2_BLOBS}, protocol=2))
    model = Detector()
    load(model, path, caplog)
    bottom_up = model.backbone.bottom_up
    assert bottom_up.stem.conv1.weight.unique().tolist() == [1]
    assert bottom_up.stem.conv1.norm.weight.unique().tolist() == [2]
    assert bottom_up.stem.conv1.norm.running_var.unique().tolist() == [1]  # folded in the file
    assert bottom_up.res2[0].shortcut.norm.weight.unique().tolist() == [5]
    assert bottom_up.res2[0].conv1.weight.unique().tolist() == [6]
    assert bottom_up.res2[0].conv2.norm.running_var.unique().tolist() == [8]
    assert "stem.conv1.norm.running_mean" not in caplog.text
    assert "linear.weight" in caplog.text
    assert "cls_score.{bias,weight}" in caplog.text


def test_zoo_pickle_is_read_without_running_it(tmp_path):
    model = Detector()
    weights = {name: value.numpy() + 1 for name, value in model.state_dict().items()}
    path = tmp_path / "zoo.pkl"
    path.write_bytes(pickle.dumps({"model": weights, "__author__": "Detectron2 Model Zoo"}))
    fresh = Detector()
    assert load(fresh, path) == {}
    assert np.array_equal(fresh.cls_score.weight.detach().numpy(), weights["cls_score.weight"])

    class Gadget:
        def __reduce__(self):
            return (print, ("executed",))

    path.write_bytes(pickle.dumps({"model": {"a": Gadget()}}))
    with pytest.raises(ValueError, match=r"builtins\.print"):
        load(fresh, path)


def test_gadget_in_a_torch_file_is_refused(tmp_path):
    class Gadget:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"model": {"a": Gadget()}}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil\.pth is not a readable file"):
        load(Detector(), tmp_path / "evil.pth")


def test_torchvision_resnet_goes_into_the_backbone(tmp_path, caplog):
    import torchvision

    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 2, 1, bias=False), nn.BatchNorm2d(2)
            block = torchvision.models.resnet.BasicBlock(
                2, 2, downsample=nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), nn.BatchNorm2d(2))
            )
            self.layer1 = nn.Sequential(block)
            self.fc = nn.Linear(2, 10)

    body = Body()
    torch.save(body.state_dict(), tmp_path / "resnet.pth")
    model = Detector()
    for part in (model.backbone.bottom_up.res2[0].conv1, model.backbone.bottom_up.res2[0].conv2):
        part.weight = nn.Parameter(torch.zeros(2, 2, 3, 3))
    load(model, tmp_path / "resnet.pth", caplog)
    block = model.backbone.bottom_up.res2[0]
    assert torch.equal(model.backbone.bottom_up.stem.conv1.weight, body.conv1.weight)
    assert torch.equal(block.conv2.weight, body.layer1[0].conv2.weight)
    assert torch.equal(block.shortcut.weight, body.layer1[0].downsample[0].weight)
    assert "PIXEL_STD [58.395" in caplog.text


@pytest.mark.parametrize("query", ["", "?matching_heuristics=True"])
def test_suffixes_match_where_no_full_name_does(tmp_path, query):
    torch.save(
        {"model": {"res2.0.conv1.weight": torch.full((2, 2, 1, 1), 5.0)}}, tmp_path / "b.pth"
    )
    model = Detector()
    load(model, f"{tmp_path / 'b.pth'}{query}")
    assert model.backbone.bottom_up.res2[0].conv1.weight.unique().item() == 5


def test_the_longest_suffix_wins_and_ambiguity_is_an_error():
    ours = {"a.b.weight": 0, "c.weight": 0}
    aligned = align_and_update_state_dicts(ours, {"b.weight": 1, "weight": 2, "x": 3}, False)
    assert aligned == {"a.b.weight": 1, "c.weight": 2, "x": 3}
    with pytest.raises(ValueError, match="fits two places"):
        align_and_update_state_dicts(ours, {"weight": 1}, False)


def test_another_class_count_loads_all_but_the_predictor(tmp_path, caplog):
    source, target = Detector(classes=80), Detector(classes=3)
    torch.save({"model": source.state_dict()}, tmp_path / "coco.pth")
    kept = target.cls_score.weight.clone()
    load(target, tmp_path / "coco.pth", caplog)
    assert torch.equal(target.bbox_pred.weight, source.bbox_pred.weight)
    assert torch.equal(target.cls_score.weight, kept)
    total = len(target.state_dict())
    [line] = caplog.messages[-1].splitlines()
    assert f"Loaded {total - 2} of the model's {total} weights" in line
    assert line.endswith("predictors, since the file's are for other classes: cls_score (80 -> 3)")


def test_a_shape_that_no_class_count_explains_is_a_row_of_the_table(tmp_path, caplog):
    source, target = Detector(), Detector()
    source.bbox_pred = nn.Linear(5, 4)
    torch.save({"model": source.state_dict()}, tmp_path / "other.pth")
    load(target, tmp_path / "other.pth", caplog)
    assert "file (4, 5), model (4, 2): kept the model's" in caplog.text
    assert "New predictors" not in caplog.text


def test_constants_and_shared_weights_are_not_reported(tmp_path, caplog):
    model = nn.Module()
    model.a = nn.Linear(2, 2)
    model.b = model.a
    torch.save(
        {
            "model": {
                "a.weight": torch.ones(2, 2),
                "a.bias": torch.ones(2),
                "pixel_mean": torch.ones(3, 1, 1),
                "proposal_generator.anchor_generator.cell_anchors.0": torch.ones(3, 4),
            }
        },
        tmp_path / "m.pth",
    )
    load(model, tmp_path / "m.pth", caplog)
    assert "Loaded 4 of the model's 4 weights" in caplog.text
    assert "not in" not in caplog.text


def test_mistakes_are_named(tmp_path):
    torch.save({"model": {"x.y": torch.ones(1)}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="none of the 1 weights"):
        load(Detector(), tmp_path / "other.pth")
    with pytest.raises(FileNotFoundError, match=r"nearest in that folder: other\.pth"):
        load(Detector(), tmp_path / "othr.pth")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        load(Detector(), tmp_path / "nowhere" / "m.pth")
    (tmp_path / "page.pth").write_text("<html>404</html>")
    with pytest.raises(ValueError, match=r"page\.pth is not a readable file"):
        load(Detector(), tmp_path / "page.pth")
    (tmp_path / "list.pkl").write_bytes(pickle.dumps([1]))
    with pytest.raises(ValueError, match="expected a dict"):
        load(Detector(), tmp_path / "list.pkl")
    assert load(Detector(), "") == {}
