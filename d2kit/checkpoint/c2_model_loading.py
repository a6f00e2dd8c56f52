"""Matches names of Caffe2's models and torchvision's ResNets to those of a model."""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2kit.checkpoint.files import (
    DIGEST,
    digest_of,
    read_checkpoint,
    write_safetensors,
)
from d2kit.checkpoint.naming import NAMINGS, Naming, as_tensor
from d2kit.utils.file_io import atomic_write
from d2kit.utils.names import nearest_names

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
_C2_BLOCK = r"res(\d)_(\d+)_branch(1|2[abc])(_bn|_gn)?_(w|b|s|rm|riv)"
_C2_STEM = r"(?:res_)?conv1(_bn|_gn)?_(w|b|s|rm|riv)"
_C2_CLASSIFIER = r"(?:fc1000|pred)_(w|b)"

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
_C2_TOWER = r"retnet_(cls|bbox)_conv_n(\d)_fpn3_(w|b)"

_TV_PREFIX = r"(?:module\.|backbone\.body\.)*"
_TV_BLOCK = _TV_PREFIX + r"layer([1-4])\.(\d+)\.(conv|bn)(\d)\.(\w+)"
_TV_SHORTCUT = _TV_PREFIX + r"layer([1-4])\.(\d+)\.downsample\.([01])\.(\w+)"
_TV_STEM = _TV_PREFIX + r"(conv|bn)1\.(\w+)"
_TV_CLASSIFIER = _TV_PREFIX + r"fc\.(\w+)"


def _c2_name(blob: str) -> str:
    """Return our name for a blob of a Caffe2 model; blobs of other layers keep theirs."""
    if found := re.fullmatch(_C2_BLOCK, blob):
        stage, block, branch, norm, suffix = found.groups()
        layer = f"res{stage}.{block}.{_C2_BRANCH[branch]}"
    elif found := re.fullmatch(_C2_STEM, blob):
        norm, suffix = found.groups()
        layer = "stem.conv1"
    elif found := re.fullmatch(_C2_CLASSIFIER, blob):
        norm, suffix, layer = None, found.group(1), "linear"
    else:
        return _c2_head_name(blob)
    return f"{layer}{'.norm' if norm else ''}.{_C2_SUFFIX[suffix]}"


def _c2_head_name(blob: str) -> str:
    """Return our name for a blob of Detectron's pyramid or heads; other blobs keep theirs."""
    if found := re.fullmatch(_C2_TOWER, blob):
        tower, number, suffix = found.groups()
        return f"head.{tower}_subnet.{2 * int(number)}.{_C2_SUFFIX[suffix]}"
    for pattern, layer in _C2_LAYERS.items():
        if found := re.fullmatch(f"{pattern}_(w|b)", blob):
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
    return any(re.fullmatch(_TV_BLOCK, name) for name in names)


def _torchvision_name(name: str) -> str:
    """Return our name for a parameter of a torchvision ResNet; others keep theirs."""
    if found := re.fullmatch(_TV_BLOCK, name):
        stage, block, kind, number, rest = found.groups()
        layer = f"res{int(stage) + 1}.{block}.conv{number}"
        return f"{layer}{'.norm' if kind == 'bn' else ''}.{rest}"
    if found := re.fullmatch(_TV_SHORTCUT, name):
        stage, block, part, rest = found.groups()
        return f"res{int(stage) + 1}.{block}.shortcut{'.norm' if part == '1' else ''}.{rest}"
    if found := re.fullmatch(_TV_STEM, name):
        return f"stem.conv1{'.norm' if found.group(1) == 'bn' else ''}.{found.group(2)}"
    if found := re.fullmatch(_TV_CLASSIFIER, name):
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


LIBRARIES = ("d2kit", "detectron2", *NAMINGS)
"""Libraries whose names `convert_weights` writes; d2kit's are Detectron2's."""

_STEM = "backbone.bottom_up.stem.conv1.weight"
_CONSTANT = r"(^|\.)(pixel_mean|pixel_std|cell_anchors\.\d+)$"
_DENSE = "head.cls_score.weight"
_PREDICTORS = ("roi_heads.box_predictor.", "roi_heads.mask_head.predictor.", "head.cls_score.")
_TWO_STAGE = "proposal_generator.rpn_head.anchor_deltas.weight"

# COCO's category ids are 1 to 90; these ten have no category, yet torchvision's models have rows.
_UNUSED_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
_COCO_IDS = tuple(i for i in range(1, 91) if i not in _UNUSED_IDS)


def recognise_naming(names: Iterable[str]) -> Naming | None:
    """Return the naming of another library's detector that weight names follow.

    Args:
        names: of the weights in a file.

    Returns:
        The naming; None where they are ours or of no known detector.
    """
    known = {name.removeprefix("module.") for name in names}
    every = (naming for namings in NAMINGS.values() for naming in namings)
    return next((naming for naming in every if naming.fits(known)), None)


def convert_weights(weights: Mapping[str, Any], library: str) -> dict[str, Any]:
    """Rename weights, of whatever known library, to those of another one.

    Args:
        weights: name -> tensor or array; ``num_batches_tracked`` and names that no rule knows stay.
        library: one of `LIBRARIES`.

    Returns:
        New names -> the same values; predictors with reordered rows. Torchvision's box and mask
        predictors have rows of background, which nothing reads: they are dropped, or zero.

    Raises:
        KeyError: if there is no such library.
        ValueError: if these are no weights of an R-CNN or RetinaNet on FPN, or a head has no equal
            there.
    """
    if library not in LIBRARIES:
        raise KeyError(
            f"no names of library '{library}' are known; nearest: "
            f"{nearest_names(library, LIBRARIES)}, known: {list(LIBRARIES)}"
        )
    source = recognise_naming(weights)
    plain = {name.removeprefix("module."): value for name, value in weights.items()}
    ours = plain if source is None else source.to_ours(plain)
    if library not in NAMINGS:
        return ours
    ours = {name: value for name, value in ours.items() if not re.search(_CONSTANT, name)}
    two_stage, dense = NAMINGS[library]
    target = two_stage if _TWO_STAGE in ours else dense
    if _STEM not in ours or not (_TWO_STAGE in ours or _DENSE in ours):
        raise ValueError(
            f"only detectors with ResNet, FPN and RPN or RetinaNet's head can be converted to "
            f"{library}; this one has e.g. {sorted(ours)[:3]} and lacks {_STEM}, {_TWO_STAGE} or "
            f"{_DENSE}"
        )
    if left := target.without_twin(ours):
        raise ValueError(
            f"{target.title} has no equal of {len(left)} weights, e.g. {sorted(left)[:3]}: a "
            f"model with such parts cannot be converted to {library}"
        )
    return target.to_theirs(ours)


def trained_classes(checkpoint: Mapping[str, Any]) -> list[str]:
    """Return the names of the classes that MMDetection notes in a checkpoint, or none.

    Args:
        checkpoint: what a file holds; "meta" has ``CLASSES`` (version 2) or ``dataset_meta``.
    """
    meta = checkpoint.get("meta")
    if not isinstance(meta, Mapping):
        return []
    dataset = meta.get("dataset_meta")
    places = (meta, dataset if isinstance(dataset, Mapping) else {})
    found = next((p[key] for p in places for key in ("CLASSES", "classes") if key in p), ())
    return [str(name) for name in found] if isinstance(found, (list, tuple)) else [str(found)]


def select_coco_classes(
    weights: Mapping[str, Any], model: Mapping[str, Tensor]
) -> tuple[dict[str, Any], str]:
    """Bring torchvision's predictors of COCO's 90 category ids to the classes a model has.

    Args:
        weights: under our names, background last; R-CNN with 90 classes, RetinaNet with 91 (the
            first is never predicted).
        model: the model's state dict, whose shapes tell its number of classes.

    Returns:
        The weights, with the rows of the model's 80 classes (COCO's, in order of their ids) or of
        all 90; and a sentence on what was done, "" for nothing.
    """
    result, done = dict(weights), ""
    for name in [n for n in weights if n.startswith(_PREDICTORS) and n in model]:
        rows = as_tensor(weights[name])
        ids = _rows_of_classes(name, len(rows), len(model[name]))
        if ids is not None:
            result[name] = rows[ids]
            done = (
                "Its classes are COCO's category ids 1 to 90: the rows of the model's classes were "
                "taken"
            )
    return result, done


def _rows_of_classes(name: str, have: int, wanted: int) -> Tensor | None:
    """Return which of `have` rows of a predictor make the `wanted` ones; None: no such change."""
    ids = torch.tensor(_COCO_IDS)
    if name.startswith("roi_heads.box_predictor.cls_score") and (have, wanted) == (91, 81):
        return torch.cat([ids - 1, torch.tensor([90])])
    per_class = 4 if "bbox_pred" in name else 1
    if not name.startswith("head.") and (have, wanted) == (90 * per_class, 80 * per_class):
        first = (ids - 1) * per_class
        return (first[:, None] + torch.arange(per_class)).flatten()
    if name.startswith("head.cls_score"):
        anchors, rest = divmod(have, 91)
        for chosen in (ids, torch.arange(1, 91)):
            if not rest and wanted == anchors * len(chosen):
                return (torch.arange(anchors)[:, None] * 91 + chosen).flatten()
    return None


def convert_file(source: Path, target: Path, library: str) -> str:
    """Write the weights of a file under the names of another library.

    Args:
        source: see `read_checkpoint`.
        target: ``.pth`` (with the dict that the library expects around the weights),
            ``.safetensors`` (weights alone) or ``.pkl`` (NumPy arrays, as Detectron2's model zoo).
        library: one of `LIBRARIES`.

    Returns:
        A sentence on what was done.

    Raises:
        KeyError: if there is no such library.
        ValueError: if the file cannot be read, converted, or written with such a suffix.
    """
    if target.suffix not in (".pth", ".safetensors", ".pkl"):
        raise ValueError(f"{target}: expected the suffix .pth, .safetensors or .pkl")
    checkpoint = read_checkpoint(source)
    found = checkpoint["model"]
    naming = recognise_naming(found)
    weights = {name: as_tensor(value) for name, value in convert_weights(found, library).items()}
    with atomic_write(target) as file:
        if target.suffix == ".safetensors":
            file.write(write_safetensors(weights))
        elif target.suffix == ".pkl":
            arrays = {name: value.numpy() for name, value in weights.items()}
            content = {"model": arrays, "__author__": "d2kit", DIGEST: digest_of(weights)}
            pickle.dump(content, file, protocol=4)
        else:
            torch.save(_wrapped(weights, library, checkpoint), file)
    title = naming.title if naming else "Detectron2"
    return f"{source}: names of {title}; {len(weights)} weights to {target}, names of {library}"


def _wrapped(
    weights: dict[str, Tensor], library: str, checkpoint: dict[str, Any]
) -> dict[str, Any]:
    """Put around the weights what the library expects."""
    if library == "torchvision":
        return weights
    if library == "mmdetection":
        meta = checkpoint.get("meta")
        return {"meta": meta if isinstance(meta, dict) else {}, "state_dict": weights}
    return {"model": weights}
