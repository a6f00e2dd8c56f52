"""Matches names of Caffe2's models and torchvision's ResNets to those of a model."""

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from d2kit.checkpoint.naming import as_tensor

__all__ = [
    "align_and_update_state_dicts",
    "convert_c2_names",
    "convert_torchvision_names",
    "is_torchvision_resnet",
]

logger = logging.getLogger(__name__)

# Blob suffix in Caffe2 -> parameter; a batch norm there is a scale and a shift.
_C2_SUFFIX = {"w": "weight", "b": "bias", "s": "weight", "rm": "running_mean", "riv": "running_var"}
_C2_BRANCH = {"1": "shortcut", "2a": "conv1", "2b": "conv2", "2c": "conv3"}
_C2_BLOCK = re.compile(r"res(\d)_(\d+)_branch(1|2[abc])(_bn|_gn)?_(w|b|s|rm|riv)")
_C2_STEM = re.compile(r"(?:res_)?conv1(_bn|_gn)?_(w|b|s|rm|riv)")
_C2_CLASSIFIER = re.compile(r"(?:fc1000|pred)_(w|b)")

# Blobs of Detectron's detectors, without the suffix -> our layer.
_C2_LAYERS = {
    r"fpn_inner_res(?P<n>\d)_\d+_sum(_lateral)?": "backbone.fpn_lateral{n}",
    r"fpn_res(?P<n>\d)_\d+_sum": "backbone.fpn_output{n}",
    r"fpn_(?P<n>[67])": "backbone.top_block.p{n}",
    r"conv_rpn(_fpn2)?": "proposal_generator.rpn_head.conv",
    r"rpn_cls_logits(_fpn2)?": "proposal_generator.rpn_head.objectness_logits",
    r"rpn_bbox_pred(_fpn2)?": "proposal_generator.rpn_head.anchor_deltas",
    r"fc6": "roi_heads.box_head.fc1",
    r"fc7": "roi_heads.box_head.fc2",
    r"cls_score": "roi_heads.box_predictor.cls_score",
    r"bbox_pred": "roi_heads.box_predictor.bbox_pred",
    r"_\[mask\]_fcn(?P<n>\d)": "roi_heads.mask_head.mask_fcn{n}",
    r"conv5_mask": "roi_heads.mask_head.deconv",
    r"mask_fcn_logits": "roi_heads.mask_head.predictor",
    r"conv_fcn(?P<n>\d)": "roi_heads.keypoint_head.conv_fcn{n}",
    r"kps_score_lowres": "roi_heads.keypoint_head.score_lowres",
    r"retnet_cls_pred_fpn3": "head.cls_score",
    r"retnet_bbox_pred_fpn3": "head.bbox_pred",
}
# Predictors whose first rows are background's -> how many.
_C2_BACKGROUND = {"cls_score": 1, "bbox_pred": 4, "mask_fcn_logits": 1}
_C2_LAYER = {re.compile(f"{blob}_(w|b)"): layer for blob, layer in _C2_LAYERS.items()}
_C2_TOWER = re.compile(r"retnet_(cls|bbox)_conv_n(\d)_fpn3_(w|b)")

_TV_PREFIX = r"(?:module\.|backbone\.body\.)*"
_TV_BLOCK = re.compile(_TV_PREFIX + r"layer([1-4])\.(\d+)\.(conv|bn)(\d)\.(\w+)")
_TV_SHORTCUT = re.compile(_TV_PREFIX + r"layer([1-4])\.(\d+)\.downsample\.([01])\.(\w+)")
_TV_STEM = re.compile(_TV_PREFIX + r"(conv|bn)1\.(\w+)")
_TV_CLASSIFIER = re.compile(_TV_PREFIX + r"fc\.(\w+)")


def _c2_name(blob: str) -> str:
    """Return our name for a blob of a Caffe2 model; blobs of other layers keep theirs."""
    if found := _C2_BLOCK.fullmatch(blob):
        stage, block, branch, norm, suffix = found.groups()
        layer = f"res{stage}.{block}.{_C2_BRANCH[branch]}"
    elif found := _C2_STEM.fullmatch(blob):
        norm, suffix = found.groups()
        layer = "stem.conv1"
    elif found := _C2_CLASSIFIER.fullmatch(blob):
        norm, suffix, layer = None, found.group(1), "linear"
    else:
        return _c2_head_name(blob)
    return f"{layer}{'.norm' if norm else ''}.{_C2_SUFFIX[suffix]}"


def _c2_head_name(blob: str) -> str:
    """Return our name for a blob of Detectron's pyramid or heads; other blobs keep theirs."""
    if found := _C2_TOWER.fullmatch(blob):
        tower, number, suffix = found.groups()
        return f"head.{tower}_subnet.{2 * int(number)}.{_C2_SUFFIX[suffix]}"
    for pattern, layer in _C2_LAYER.items():
        if found := pattern.fullmatch(blob):
            place = layer.format(n=found.groupdict().get("n"))
            return f"{place}.{_C2_SUFFIX[blob[-1]]}"
    return blob


def convert_c2_names(blobs: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the blobs of a Caffe2 model, e.g. ``res2_0_branch2a_bn_s`` to
    ``res2.0.conv1.norm.weight``; background comes last, its boxes and masks go.
    """  # noqa: D205 - one sentence
    converted = {}
    for blob, value in blobs.items():
        layer = blob.removesuffix("_w").removesuffix("_b")
        if layer in _C2_BACKGROUND:
            rows = _C2_BACKGROUND[layer]
            first = as_tensor(value)[:rows]
            value = as_tensor(value)[rows:]  # noqa: PLW2901 - without, or with it at the end
            value = torch.cat([value, first]) if layer == "cls_score" else value  # noqa: PLW2901
        converted[_c2_name(blob)] = value
    return converted


def is_torchvision_resnet(names: Iterable[str]) -> bool:
    """Tell whether parameter names are those of a torchvision ResNet, alone or in a detector."""
    return any(_TV_BLOCK.fullmatch(name) for name in names)


def _torchvision_name(name: str) -> str:
    """Return our name for a parameter of a torchvision ResNet; others keep theirs."""
    if found := _TV_BLOCK.fullmatch(name):
        stage, block, kind, number, rest = found.groups()
        layer = f"res{int(stage) + 1}.{block}.conv{number}"
        return f"{layer}{'.norm' if kind == 'bn' else ''}.{rest}"
    if found := _TV_SHORTCUT.fullmatch(name):
        stage, block, part, rest = found.groups()
        return f"res{int(stage) + 1}.{block}.shortcut{'.norm' if part == '1' else ''}.{rest}"
    if found := _TV_STEM.fullmatch(name):
        return f"stem.conv1{'.norm' if found.group(1) == 'bn' else ''}.{found.group(2)}"
    if found := _TV_CLASSIFIER.fullmatch(name):
        return f"linear.{found.group(1)}"
    return name


def convert_torchvision_names(state: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the parameters of a torchvision ResNet, e.g. ``layer1.0.bn1.weight`` to
    ``res2.0.conv1.norm.weight``.
    """  # noqa: D205 - one sentence
    return {_torchvision_name(name): value for name, value in state.items()}


def _longest_suffix(name: str, known: Mapping[str, Any]) -> str | None:
    """Return the longest dotted suffix of `name`, itself included, that is in `known`."""
    while name not in known:
        _, dot, name = name.partition(".")
        if not dot:
            return None
    return name


def align_and_update_state_dicts(
    model_state_dict: Mapping[str, Any],
    ckpt_state_dict: Mapping[str, Any],
    c2_conversion: bool = True,
) -> dict[str, Any]:
    """Rename weights so that each goes where its name is the longest suffix of the model's.

    For example ``res2.0.conv1.weight`` becomes ``backbone.bottom_up.res2.0.conv1.weight``.

    Args:
        model_state_dict: the model's names (the values are not used).
        ckpt_state_dict: the file's names -> tensors or arrays.
        c2_conversion: whether the file's names are those of Caffe2.

    Returns:
        The file's values under the model's names; values without a place keep their names.

    Raises:
        ValueError: if a weight fits several places of the model equally.
    """
    source = convert_c2_names(ckpt_state_dict) if c2_conversion else dict(ckpt_state_dict)
    target_of: dict[str, str] = {}
    for name in model_state_dict:
        match = _longest_suffix(name, source)
        if match is None:
            continue
        if match in target_of:
            raise ValueError(
                f"the weight '{match}' fits two places of the model, '{target_of[match]}' and "
                f"'{name}'; rename it in the file to the one that is meant"
            )
        target_of[match] = name
    logger.info("Matched %d of %d weights by the ends of their names", len(target_of), len(source))
    return {target_of.get(name, name): value for name, value in source.items()}
