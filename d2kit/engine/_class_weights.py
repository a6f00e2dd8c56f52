"""Weights of the classes in the loss, from how often they occur."""

import logging
from collections.abc import Mapping
from typing import Any

from d2kit.config import CfgNode
from d2kit.engine._preflight_data import count_records, records_of

__all__ = ["balanced_weights", "build_class_weights_cfg"]

logger = logging.getLogger(__name__)

SHOWN = 20


def balanced_weights(counts: Mapping[int, int], num_classes: int) -> list[float]:
    """Return weights by which all classes that occur have the same sum over the objects.

    w[c] = N / (C * n[c]) for n[c] objects of class c, N of all, C classes that occur: the mean over
    the objects is 1. A class without objects has 1.

    Source: the "balanced" heuristic, King and Zeng 2001, section 4.2 (weighting).

    Args:
        counts: class index -> objects.
        num_classes: K.

    Returns:
        K numbers, of 6 digits.
    """
    present = [counts[c] for c in range(num_classes) if counts.get(c, 0)]
    total = sum(present)
    return [
        float(f"{total / (len(present) * counts[c]):.6g}") if counts.get(c, 0) else 1.0
        for c in range(num_classes)
    ]


def build_class_weights_cfg(cfg: CfgNode, loader: Any) -> CfgNode:
    """Put numbers in the place of ``MODEL.ROI_HEADS.CLASS_WEIGHTS`` "balanced".

    They depend on the training records alone, so that all processes and a resumed run find the
    same; the checkpoints keep the config with them, and other numbers are refused on resume.

    Args:
        cfg: a full config; not changed.
        loader: the training loader.

    Returns:
        `cfg` itself where the weights are not "balanced", else a copy with a list.

    Raises:
        ValueError: if they are another word, or the training set does not tell its objects.
    """
    given = cfg.MODEL.ROI_HEADS.CLASS_WEIGHTS
    if not isinstance(given, str) or not given:
        return cfg
    if given != "balanced":
        raise ValueError(
            f"MODEL.ROI_HEADS.CLASS_WEIGHTS: expected a list, 'balanced' or None, got '{given}'"
        )
    records = records_of(loader)
    counts = count_records(records) if records is not None else None
    if counts is None or not counts.objects:
        raise ValueError(
            "MODEL.ROI_HEADS.CLASS_WEIGHTS 'balanced' needs a training set of records with "
            "annotations (build_detection_train_loader); write one weight per class instead"
        )
    frozen = cfg.is_frozen()
    cfg = cfg.clone()
    cfg.defrost()
    weights = balanced_weights(counts.classes, cfg.MODEL.ROI_HEADS.NUM_CLASSES)
    cfg.MODEL.ROI_HEADS.CLASS_WEIGHTS = weights
    logger.info(
        "Class weights, balanced over %s objects: %s; background 1",
        f"{counts.objects:,}",
        _build_text(cfg, weights),
    )
    if frozen:
        cfg.freeze()
    return cfg


def _build_text(cfg: CfgNode, weights: list[float]) -> str:
    """Name the classes with their weights, of many only the extremes."""
    from d2kit.data import MetadataCatalog

    names = list(MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("thing_classes") or ())
    if len(names) != len(weights):
        names = [f"class {c}" for c in range(len(weights))]
    order = sorted(range(len(weights)), key=lambda c: (weights[c], c))
    shown = order if len(order) <= SHOWN else [*order[: SHOWN // 2], *order[-SHOWN // 2 :]]
    text = ", ".join(f"{names[c]} {weights[c]:g}" for c in shown)
    left = len(order) - len(shown)
    return f"{text} ({left} classes between left out)" if left else text
