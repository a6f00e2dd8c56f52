"""What is known of a family of models: its thresholds, what it finds, what it learns from.

Everyone who must know it (prediction, tiles, test-time augmentation, checks before a training,
tools) asks here, by config (`build_facts`) or by model (`model_facts`).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from torch import nn

from d2kit.config import CfgNode
from d2kit.modeling.meta_arch.build import META_ARCH_REGISTRY

__all__ = ["Facts", "build_facts", "build_with_thresholds", "model_facts"]


@dataclasses.dataclass(frozen=True)
class _Family:
    """What the models of one meta-architecture have in common."""

    finds: tuple[str, ...]
    learns_from: tuple[str, ...]
    score: str | None = None
    nms: str | None = None
    classes: str | None = None


def _detector(
    section: str, *, finds: tuple[str, ...] = (), learns: tuple[str, ...] = ()
) -> _Family:
    keys = (f"MODEL.{section}.{k}" for k in ("SCORE_THRESH_TEST", "NMS_THRESH_TEST", "NUM_CLASSES"))
    return _Family(("instances", *finds), ("boxes", *learns), *keys)


_PIXELS = "MODEL.SEM_SEG_HEAD.NUM_CLASSES"
FAMILIES = {
    "GeneralizedRCNN": _detector("ROI_HEADS"),
    "PanopticFPN": _detector(
        "ROI_HEADS", finds=("sem_seg", "panoptic_seg"), learns=("segmentation",)
    ),
    "RetinaNet": _detector("RETINANET"),
    "FCOS": _detector("FCOS"),
    "ProposalNetwork": _Family(("proposals",), ("boxes",), nms="MODEL.RPN.NMS_THRESH"),
    "SemanticSegmentor": _Family(("sem_seg",), ("segmentation",), classes=_PIXELS),
    "PanopticDeepLab": _Family(
        ("sem_seg", "panoptic_seg", "instances"), ("panoptic",), classes=_PIXELS
    ),
}
"""Meta-architecture -> what its models have in common; a subclass has what its nearest base has."""

_UNKNOWN = _Family((), ())


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of one model.

    Attributes:
        family: the entry of `FAMILIES`, "" for a model that we do not know.
        finds: keys of its results: "instances", "proposals", "sem_seg", "panoptic_seg".
        learns_from: what it needs of an annotation: "boxes", "masks", "keypoints", "segmentation"
            (a label map), "panoptic".
        rotated: whether its boxes have an angle.
        score_key: config key of the score below which detections go; None: it has none.
        nms_key: config key of the IoU above which the better detection stays alone; None likewise.
        classes_key: config key of the number of classes, background not counted; None likewise.
        score_threshold: the value, in [0, 1].
        nms_threshold: the value, in [0, 1].
        num_classes: the value.
    """

    family: str
    finds: tuple[str, ...]
    learns_from: tuple[str, ...]
    rotated: bool
    score_key: str | None
    nms_key: str | None
    classes_key: str | None
    score_threshold: float | None
    nms_threshold: float | None
    num_classes: int | None

    @property
    def finds_instances(self) -> bool:
        """Whether the model gives `Instances` with scores and classes."""
        return "instances" in self.finds

    @property
    def detected_classes(self) -> int | None:
        """Number of classes of objects; None for models that only label pixels or propose."""
        return self.num_classes if "boxes" in self.learns_from else None


def _family_of(kind: type | None) -> str:
    """Return the nearest known base of a class; "" where there is none."""
    names = [base.__name__ for base in kind.__mro__] if kind is not None else []
    return next((name for name in names if name in FAMILIES), "")


def _value(cfg: CfgNode, key: str | None) -> Any:
    """Return the value of a dotted key; None where the config has none."""
    node: Any = cfg
    for part in key.split(".") if key else ():
        if not isinstance(node, CfgNode) or part not in node:
            return None
        node = node[part]
    return node if key else None


def build_facts(cfg: CfgNode) -> Facts:
    """Return what is known of the model of a config, without building it.

    Args:
        cfg: a full config. A registered model of one's own counts as its nearest known base.

    Example:
        >>> from d2kit.config import get_cfg
        >>> build_facts(get_cfg()).score_key
        'MODEL.ROI_HEADS.SCORE_THRESH_TEST'
    """
    name = cfg.MODEL.META_ARCHITECTURE
    if name not in FAMILIES:
        kind = META_ARCH_REGISTRY.get(name) if name in META_ARCH_REGISTRY else None
        name = _family_of(kind) if isinstance(kind, type) else ""
    family = FAMILIES.get(name, _UNKNOWN)
    roi = family.classes == "MODEL.ROI_HEADS.NUM_CLASSES"
    learns = list(family.learns_from)
    if roi:
        learns += ["masks"] * bool(cfg.MODEL.MASK_ON) + ["keypoints"] * bool(cfg.MODEL.KEYPOINT_ON)
    rotated = (roi and "RROI" in cfg.MODEL.ROI_HEADS.NAME) or (
        name == "ProposalNetwork" and cfg.MODEL.PROPOSAL_GENERATOR.NAME == "RRPN"
    )
    return Facts(
        family=name,
        finds=family.finds,
        learns_from=tuple(learns),
        rotated=rotated,
        score_key=family.score,
        nms_key=family.nms,
        classes_key=family.classes,
        score_threshold=_value(cfg, family.score),
        nms_threshold=_value(cfg, family.nms),
        num_classes=_value(cfg, family.classes),
    )


def build_with_thresholds(
    cfg: CfgNode, *, score: float | None = None, nms: float | None = None
) -> CfgNode:
    """Return a copy of a config with other thresholds, set where its model reads them.

    Args:
        cfg: a full config; not changed.
        score: least score of a detection, in [0, 1]; None: as it is.
        nms: IoU above which the better detection of a class stays alone, in [0, 1]; None likewise.

    Returns:
        `cfg` itself where nothing is to change, else a copy that is frozen where `cfg` is.

    Raises:
        ValueError: if a threshold is not a number in [0, 1], or the model has none.
    """
    facts = build_facts(cfg)
    wanted = {"score": (facts.score_key, score), "NMS": (facts.nms_key, nms)}
    changes: list[Any] = []
    for what, (key, value) in wanted.items():
        if value is None:
            continue
        number = float(value)
        if not (math.isfinite(number) and 0 <= number <= 1):
            raise ValueError(f"{what} threshold: expected a number in [0, 1], got {value}")
        if key is None:
            raise ValueError(
                f"{what} threshold {value}: MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE} "
                "has none; leave it out"
            )
        changes += [key, number]
    if not changes:
        return cfg
    changed: CfgNode = cfg.clone()
    changed.defrost()
    changed.merge_from_list(changes)
    if cfg.is_frozen():
        changed.freeze()
    return changed


def model_facts(model: nn.Module) -> Facts:
    """Return what is known of a built model: `build_facts` of what it was built of.

    Args:
        model: not wrapped for several processes.

    Returns:
        The same facts, the values as the model has them now (attributes may have been changed).
    """
    name = _family_of(type(model))
    family = FAMILIES.get(name, _UNKNOWN)
    heads = getattr(model, "roi_heads", None)
    predictor = getattr(heads, "box_predictor", None)
    if isinstance(predictor, nn.ModuleList):  # a cascade: the last stage decides
        predictor = predictor[-1]
    place: Any = predictor if heads is not None else model
    learns = list(family.learns_from)
    learns += ["masks"] * bool(getattr(heads, "mask_on", False))
    learns += ["keypoints"] * bool(getattr(heads, "keypoint_on", False))
    from d2kit.modeling.proposal_generator import RRPN

    generator = getattr(model, "proposal_generator", None)
    classes = {
        "ROI_HEADS": getattr(heads, "num_classes", None),
        "SEM_SEG_HEAD": getattr(getattr(model, "sem_seg_head", None), "num_classes", None),
    }
    section = family.classes.split(".")[1] if family.classes else ""
    nms_place, attribute = place, "test_nms_thresh"
    if name == "ProposalNetwork":
        nms_place, attribute = generator, "nms_thresh"
    return Facts(
        family=name,
        finds=family.finds,
        learns_from=tuple(learns),
        rotated=isinstance(generator, RRPN),
        score_key=family.score,
        nms_key=family.nms,
        classes_key=family.classes,
        score_threshold=getattr(place, "test_score_thresh", None),
        nms_threshold=getattr(nms_place, attribute, None),
        num_classes=classes.get(section, getattr(model, "num_classes", None)),
    )
