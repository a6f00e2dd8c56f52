"""The names of torchvision's and MMDetection's detectors beside Detectron2's.

The names are facts, taken from state dicts of torchvision 0.29 and MMDetection 3.3. Rules without
a twin in the newest version (``rpn.head.conv.weight``) are those of older files, which are read
and not written.
"""

import re
from collections.abc import Mapping
from typing import Any

from d2kit.checkpoint._naming import Naming, Rule, as_tensor
from d2kit.checkpoint._naming_rows import BACKGROUND_FIRST, RATIO_MAJOR, BackgroundRows

__all__ = ["MMDETECTION_RCNN", "MMDETECTION_RETINANET", "NAMINGS", "TORCHVISION_RCNN"]

_BODY = "backbone.bottom_up."
_RPN = "proposal_generator.rpn_head."
_BOX = "roi_heads.box_head."
_PREDICTOR = "roi_heads.box_predictor."
_MASK = "roi_heads.mask_head."
_KEYPOINT = "roi_heads.keypoint_head."

# ------------------------------------------------------------------ what several models share


def _resnet(prefix: str) -> tuple[Rule, ...]:
    pairs = {
        "stem.conv1.norm.*": "bn1.*",
        "stem.conv1.*": "conv1.*",
        "res{s+2}.{b}.shortcut.norm.*": "layer{s+1}.{b}.downsample.1.*",
        "res{s+2}.{b}.shortcut.*": "layer{s+1}.{b}.downsample.0.*",
        "res{s+2}.{b}.conv{k}.norm.*": "layer{s+1}.{b}.bn{k}.*",
        "res{s+2}.{b}.conv{k}.*": "layer{s+1}.{b}.conv{k}.*",
    }
    return tuple(Rule(_BODY + ours, prefix + theirs) for ours, theirs in pairs.items())


def _torchvision_fpn(finest: int) -> tuple[Rule, ...]:
    rules = []
    for ours, theirs in (("lateral", "inner_blocks"), ("output", "layer_blocks")):
        level, place = f"backbone.fpn_{ours}{{l+{finest}}}", f"backbone.fpn.{theirs}.{{l}}"
        rules += [
            Rule(f"{level}.norm.*", f"{place}.1.*"),
            Rule(f"{level}.*", f"{place}.0.*"),
            Rule(f"{level}.*", f"{place}.*"),  # until torchvision 0.12
        ]
    return tuple(rules)


def _mmdetection_fpn(finest: int) -> tuple[Rule, ...]:
    return (
        Rule(f"backbone.fpn_lateral{{l+{finest}}}.*", "neck.lateral_convs.{l}.conv.*"),
        Rule(f"backbone.fpn_output{{l+{finest}}}.*", "neck.fpn_convs.{l}.conv.*"),
    )


# ------------------------------------------------------------------ torchvision

_FOUR_CONVS = (f"{_BOX}conv1.weight", "roi_heads.box_head.0.0.weight")
_TWO_RPN_CONVS = (f"{_RPN}conv.conv1.weight", "rpn.head.conv.1.0.weight")


def _resnets_only(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Refuse detectors on MobileNet: no config of ours makes that network."""
    other = next((name for name in weights if name.startswith("backbone.body.")), None)
    if other is not None:
        raise ValueError(
            f"the weight '{other}' is of no ResNet: of torchvision's detectors those on ResNets "
            "can be loaded, those on MobileNet (fasterrcnn_mobilenet_v3_large_fpn) cannot"
        )
    return dict(weights)


TORCHVISION_RCNN = Naming(
    "torchvision's R-CNN",
    ("rpn.head.cls_logits.weight",),
    (
        *_resnet("backbone.body."),
        *_torchvision_fpn(2),
        Rule(f"{_RPN}conv.conv{{i}}.*", "rpn.head.conv.{i}.0.*", only_if=_TWO_RPN_CONVS),
        Rule(f"{_RPN}conv.*", "rpn.head.conv.0.0.*"),
        Rule(f"{_RPN}conv.*", "rpn.head.conv.*"),  # until 0.12
        Rule(f"{_RPN}objectness_logits.*", "rpn.head.cls_logits.*"),
        Rule(f"{_RPN}anchor_deltas.*", "rpn.head.bbox_pred.*"),
        Rule(f"{_BOX}conv{{i+1}}.norm.*", "roi_heads.box_head.{i}.1.*"),
        Rule(f"{_BOX}conv{{i+1}}.*", "roi_heads.box_head.{i}.0.*"),
        Rule(f"{_BOX}fc{{i+1}}.*", "roi_heads.box_head.{i*2+5}.*", only_if=_FOUR_CONVS),
        Rule(f"{_BOX}fc{{i+1}}.*", "roi_heads.box_head.fc{i+6}.*"),
        Rule(f"{_PREDICTOR}cls_score.*", f"{_PREDICTOR}cls_score.*", BACKGROUND_FIRST),
        Rule(f"{_PREDICTOR}bbox_pred.*", f"{_PREDICTOR}bbox_pred.*", BackgroundRows(4)),
        Rule(f"{_MASK}mask_fcn{{i+1}}.norm.*", "roi_heads.mask_head.{i}.1.*"),
        Rule(f"{_MASK}mask_fcn{{i+1}}.*", "roi_heads.mask_head.{i}.0.*"),
        Rule(f"{_MASK}mask_fcn{{i+1}}.*", "roi_heads.mask_head.mask_fcn{i+1}.*"),  # until 0.12
        Rule(f"{_MASK}deconv.*", "roi_heads.mask_predictor.conv5_mask.*"),
        Rule(
            f"{_MASK}predictor.*", "roi_heads.mask_predictor.mask_fcn_logits.*", BackgroundRows(1)
        ),
        Rule(f"{_KEYPOINT}conv_fcn{{i+1}}.*", "roi_heads.keypoint_head.{i*2}.*"),
        Rule(f"{_KEYPOINT}score_lowres.*", "roi_heads.keypoint_predictor.kps_score_lowres.*"),
    ),
    advice="the models of configs/torchvision compute with them what torchvision computes",
    class_bias=(f"{_PREDICTOR}cls_score.bias", f"{_PREDICTOR}cls_score.bias"),
    finish=_resnets_only,
)


def _torchvision_tower(ours: str, theirs: str) -> tuple[Rule, ...]:
    normed = (f"head.{ours}.1.weight", f"head.{theirs}.conv.0.1.weight")
    return (
        Rule(f"head.{ours}.{{i*3+1}}.*", f"head.{theirs}.conv.{{i}}.1.*", only_if=normed),
        Rule(f"head.{ours}.{{i*3}}.*", f"head.{theirs}.conv.{{i}}.0.*", only_if=normed),
        Rule(f"head.{ours}.{{i*2}}.*", f"head.{theirs}.conv.{{i}}.0.*"),
        Rule(f"head.{ours}.{{i*2}}.*", f"head.{theirs}.conv.{{i*2}}.*"),  # until 0.12
    )


_TOWER_WEIGHT = re.compile(r"head\.(cls|bbox)_subnet\.\d+\.weight")


def _with_tower_bias(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Add a bias of 0 where a convolution of a tower has none: ours always have one."""
    result = dict(weights)
    for name, value in weights.items():
        bias = f"{name.removesuffix('weight')}bias"
        if _TOWER_WEIGHT.fullmatch(name) and bias not in weights:
            result[bias] = as_tensor(value).new_zeros(len(value))
    return result


def _without_tower_bias(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the biases of convolutions before a norm, which torchvision's have not."""
    result = dict(weights)
    if "head.cls_subnet.1.weight" not in weights:
        return result
    for name, value in weights.items():
        if not _TOWER_WEIGHT.fullmatch(name) or as_tensor(value).dim() == 1:
            continue  # no tower, or the norm's
        bias = as_tensor(result.pop(f"{name.removesuffix('weight')}bias"))
        if bias.any():
            raise ValueError(
                f"{name} has a bias that is not 0; torchvision's RetinaNet with norm has none"
            )
    return result


TORCHVISION_RETINANET = Naming(
    "torchvision's RetinaNet",
    ("head.classification_head.cls_logits.weight",),
    (
        *_resnet("backbone.body."),
        *_torchvision_fpn(3),
        Rule("backbone.top_block.p{l}.*", "backbone.fpn.extra_blocks.p{l}.*"),
        *_torchvision_tower("cls_subnet", "classification_head"),
        *_torchvision_tower("bbox_subnet", "regression_head"),
        Rule("head.cls_score.*", "head.classification_head.cls_logits.*", RATIO_MAJOR),
        Rule("head.bbox_pred.*", "head.regression_head.bbox_reg.*", RATIO_MAJOR),
    ),
    advice="the models of configs/torchvision compute with them what torchvision computes",
    class_bias=("head.cls_score.bias", "head.classification_head.cls_logits.bias"),
    box_bias=("head.bbox_pred.bias", "head.regression_head.bbox_reg.bias"),
    finish=_with_tower_bias,
    prepare=_without_tower_bias,
)

# ------------------------------------------------------------------ MMDetection

_CASCADE = (f"{_PREDICTOR}0.cls_score.weight", "roi_head.bbox_head.0.fc_cls.weight")
_MMDETECTION_ADVICE = (
    "those with style='pytorch' in their config need a config of configs/mmdetection, those with "
    "'caffe' one of the model zoo (BGR, PIXEL_STD 1, STRIDE_IN_1X1 True)"
)


def _mmdetection_mask(ours: str, theirs: str) -> tuple[Rule, Rule]:
    """The mask head; a cascade has one per stage, of which the last becomes the only one."""
    first_two = tuple(f"roi_head.mask_head.{stage}.{theirs}" for stage in (0, 1))
    return (
        Rule(_MASK + ours, f"roi_head.mask_head.2.{theirs}", only_if=_CASCADE, copies=first_two),
        Rule(_MASK + ours, f"roi_head.mask_head.{theirs}"),
    )


MMDETECTION_RCNN = Naming(
    "MMDetection's R-CNN",
    ("roi_head.bbox_head.fc_cls.weight", "roi_head.bbox_head.0.fc_cls.weight"),
    (
        *_resnet("backbone."),
        *_mmdetection_fpn(2),
        Rule(f"{_RPN}conv.*", "rpn_head.rpn_conv.*"),
        Rule(f"{_RPN}objectness_logits.*", "rpn_head.rpn_cls.*"),
        Rule(f"{_RPN}anchor_deltas.*", "rpn_head.rpn_reg.*"),
        Rule(f"{_BOX}fc{{i+1}}.*", "roi_head.bbox_head.shared_fcs.{i}.*"),
        Rule(f"{_BOX}{{k}}.fc{{i+1}}.*", "roi_head.bbox_head.{k}.shared_fcs.{i}.*"),
        Rule(f"{_PREDICTOR}cls_score.*", "roi_head.bbox_head.fc_cls.*"),
        Rule(f"{_PREDICTOR}bbox_pred.*", "roi_head.bbox_head.fc_reg.*"),
        Rule(f"{_PREDICTOR}{{k}}.cls_score.*", "roi_head.bbox_head.{k}.fc_cls.*"),
        Rule(f"{_PREDICTOR}{{k}}.bbox_pred.*", "roi_head.bbox_head.{k}.fc_reg.*"),
        *_mmdetection_mask("mask_fcn{i+1}.*", "convs.{i}.conv.*"),
        *_mmdetection_mask("deconv.*", "upsample.*"),
        *_mmdetection_mask("predictor.*", "conv_logits.*"),
    ),
    advice=_MMDETECTION_ADVICE,
    class_bias=(f"{_PREDICTOR}cls_score.bias", "roi_head.bbox_head.fc_cls.bias"),
)

MMDETECTION_RETINANET = Naming(
    "MMDetection's RetinaNet",
    ("bbox_head.retina_cls.weight",),
    (
        *_resnet("backbone."),
        Rule("backbone.top_block.p{l+6}.*", "neck.fpn_convs.{l+3}.conv.*"),
        *_mmdetection_fpn(3),
        Rule("head.cls_subnet.{i*2}.*", "bbox_head.cls_convs.{i}.conv.*"),
        Rule("head.bbox_subnet.{i*2}.*", "bbox_head.reg_convs.{i}.conv.*"),
        Rule("head.cls_score.*", "bbox_head.retina_cls.*", RATIO_MAJOR),
        Rule("head.bbox_pred.*", "bbox_head.retina_reg.*", RATIO_MAJOR),
    ),
    advice=_MMDETECTION_ADVICE,
    class_bias=("head.cls_score.bias", "bbox_head.retina_cls.bias"),
    box_bias=("head.bbox_pred.bias", "bbox_head.retina_reg.bias"),
)

NAMINGS: dict[str, tuple[Naming, Naming]] = {
    "torchvision": (TORCHVISION_RCNN, TORCHVISION_RETINANET),
    "mmdetection": (MMDETECTION_RCNN, MMDETECTION_RETINANET),
}
"""Library -> its namings of R-CNN and of RetinaNet."""
