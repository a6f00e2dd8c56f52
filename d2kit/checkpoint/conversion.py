"""Weights of other libraries: recognising their names, converting them, both ways.

Four sets of names are known: Detectron2's (which are ours), torchvision's, MMDetection's and
Caffe2's (ResNets only, see `c2_model_loading`). Conversion renames and reorders rows; no number
changes, so that a weight that goes there and back is the same bit for bit.
"""

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
from d2kit.utils.registry import nearest_names

__all__ = [
    "LIBRARIES",
    "convert_file",
    "convert_weights",
    "recognise_naming",
    "select_coco_classes",
    "trained_classes",
]

logger = logging.getLogger(__name__)

LIBRARIES = ("d2kit", "detectron2", *NAMINGS)
"""Libraries whose names `convert_weights` writes; d2kit's are Detectron2's."""

_STEM = "backbone.bottom_up.stem.conv1.weight"
_CONSTANT = re.compile(r"(^|\.)(pixel_mean|pixel_std|cell_anchors\.\d+)$")
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
    ours = {name: value for name, value in ours.items() if not _CONSTANT.search(name)}
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


def _wrapped(weights: dict[str, Tensor], library: str, checkpoint: dict[str, Any]) -> Any:
    """Put around the weights what the library expects."""
    if library == "torchvision":
        return weights
    if library == "mmdetection":
        meta = checkpoint.get("meta")
        return {"meta": meta if isinstance(meta, dict) else {}, "state_dict": weights}
    return {"model": weights}
