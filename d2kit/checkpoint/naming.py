"""The names of torchvision's and MMDetection's detectors beside Detectron2's.

The names are facts, taken from state dicts of torchvision 0.29 and MMDetection 3.3. Rules without
a twin in the newest version (``rpn.head.conv.weight``) are those of older files, which are read
and not written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

Change = Callable[[Mapping[str, Any]], dict[str, Any]]

_PLACE = r"\{(?P<name>\w)(?:\*(?P<scale>\d+))?(?P<shift>[+-]\d+)?\}|\*"


class Template:
    """A pattern of names that can also make names.

    Args:
        text: see the module.
    """

    def __init__(self, text: str) -> None:
        self._pieces: list[str | tuple[str, int, int]] = []  # text, or (place, scale, shift)
        pattern, end = "", 0
        for found in re.finditer(_PLACE, text):
            before = text[end : found.start()]
            end = found.end()
            place = found["name"] or "*"
            self._pieces += [before, (place, int(found["scale"] or 1), int(found["shift"] or 0))]
            pattern += re.escape(before) + (r"([A-Za-z_]+)" if place == "*" else r"(\d+)")
        self._pieces.append(text[end:])
        self._pattern = re.compile(pattern + re.escape(text[end:]))

    def read(self, name: str) -> dict[str, Any] | None:
        """Return what stands at the places, or None if the name is of another form."""
        found = self._pattern.fullmatch(name)
        if found is None:
            return None
        values: dict[str, Any] = {}
        places = [piece for piece in self._pieces if not isinstance(piece, str)]
        for (place, scale, shift), text in zip(places, found.groups(), strict=True):
            if place == "*":
                values[place] = text
                continue
            number, rest = divmod(int(text) - shift, scale)
            if rest or number < 0 or values.setdefault(place, number) != number:
                return None
        return values

    def write(self, values: Mapping[str, Any]) -> str | None:
        """Return the name with `values` at its places; None if a number would be negative."""
        parts = []
        for piece in self._pieces:
            if isinstance(piece, str):
                parts.append(piece)
                continue
            place, scale, shift = piece
            value = values[place] if place == "*" else values[place] * scale + shift
            if place != "*" and value < 0:
                return None
            parts.append(str(value))
        return "".join(parts)


@dataclass(frozen=True)
class Facts:
    """What the rows of a predictor mean.

    Args:
        classes: K, without background.
        anchors: per position, of a dense head.
    """

    classes: int = 0
    anchors: int = 0


class Rows:
    """A change of the rows (axis 0) of a weight; subclasses invert each other's two methods."""

    def to_ours(self, rows: Tensor, facts: Facts) -> Tensor:
        """Return the rows in our order."""
        raise NotImplementedError

    def to_theirs(self, rows: Tensor, facts: Facts) -> Tensor:
        """Return the rows in the other library's order."""
        raise NotImplementedError


@dataclass(frozen=True)
class Rule:
    """One pair of templates.

    Args:
        ours: Detectron2's name.
        theirs: the other library's.
        rows: how rows are reordered; None: not at all.
        only_if: names, ours and theirs, without which the rule does not apply on that side.
        copies: further names in the other library that hold the same; read from `theirs` only.
    """

    ours: str
    theirs: str
    rows: Rows | None = None
    only_if: tuple[str, str] | None = None
    copies: tuple[str, ...] = ()

    @cached_property
    def sides(self) -> tuple[Template, Template]:
        """The templates, ours and theirs."""
        return Template(self.ours), Template(self.theirs)

    @cached_property
    def others(self) -> tuple[Template, ...]:
        """The templates of the copies."""
        return tuple(map(Template, self.copies))


def as_tensor(value: object) -> Tensor:
    """Return a tensor or NumPy array as a tensor, without a copy where that is possible."""
    return torch.from_numpy(np.asarray(value)) if not isinstance(value, Tensor) else value


class Naming:
    """The names that one library gives to the weights of one family of models.

    Args:
        title: how messages call it.
        marks: names of which one tells that weights are named so.
        rules: the first that fits a name decides.
        advice: what a model must be to use these weights, for messages.
        class_bias: names, ours and theirs, of a bias with a row per class, background included, or
            per class and anchor of a dense head.
        box_bias: names, ours and theirs, of a dense head's bias with 4 rows per anchor.
        finish: what else to do with weights from there, under our names.
        prepare: its inverse, before they get their names.
    """

    def __init__(
        self,
        title: str,
        marks: Iterable[str],
        rules: Iterable[Rule],
        *,
        advice: str = "",
        class_bias: tuple[str, str] = ("", ""),
        box_bias: tuple[str, str] = ("", ""),
        finish: Change = dict,
        prepare: Change = dict,
    ) -> None:
        self.title = title
        self.marks = tuple(marks)
        self.rules = tuple(rules)
        self.advice = advice
        self._class_bias = class_bias
        self._box_bias = box_bias
        self._finish = finish
        self._prepare = prepare

    def fits(self, names: Iterable[str]) -> bool:
        """Tell whether weights with these names are named so."""
        known = set(names)
        return any(mark in known for mark in self.marks)

    def without_twin(self, weights: Mapping[str, Any]) -> list[str]:
        """Return the names of ours to which the other library has no equal."""
        active = [r for r in self.rules if r.only_if is None or r.only_if[0] in weights]
        return [name for name in weights if _first(active, name, 0)[0] is None]

    def to_ours(self, weights: Mapping[str, Any]) -> dict[str, Any]:
        """Return the weights under Detectron2's names; what no rule knows keeps its name."""
        return self._finish(self._convert(weights, 1))

    def to_theirs(self, weights: Mapping[str, Any]) -> dict[str, Any]:
        """Return weights with Detectron2's names under the other library's."""
        return self._convert(self._prepare(weights), 0)

    def _convert(self, weights: Mapping[str, Any], side: int) -> dict[str, Any]:
        """Rename from `side` (0 ours, 1 theirs) to the other."""
        active = [r for r in self.rules if r.only_if is None or r.only_if[side] in weights]
        facts = self._facts(weights, side)
        result: dict[str, Any] = {}
        for name, value in weights.items():
            rule, values = _first(active, name, side)
            if rule is None or values is None:
                result[name] = value
                continue
            target = rule.sides[1 - side].write(values) or name
            if rule.rows is not None:
                rows = as_tensor(value)
                change = rule.rows.to_ours if side else rule.rows.to_theirs
                value = change(rows, facts)  # noqa: PLW2901 - the new rows of this weight
            result[target] = value
            if not side:
                for other in rule.others:
                    result[other.write(values) or name] = value
        return result if not side else self._without_copies(result, active)

    def _without_copies(self, weights: dict[str, Any], active: list[Rule]) -> dict[str, Any]:
        others = [template for rule in active for template in rule.others]
        return {k: v for k, v in weights.items() if all(t.read(k) is None for t in others)}

    def _facts(self, weights: Mapping[str, Any], side: int) -> Facts:
        anchors, classes = 0, 0
        if self._box_bias[side] in weights:
            anchors = len(weights[self._box_bias[side]]) // 4
        if self._class_bias[side] in weights:
            rows = len(weights[self._class_bias[side]])
            classes = rows // anchors if anchors else rows - 1
        return Facts(classes, anchors)


def _first(rules: list[Rule], name: str, side: int) -> tuple[Rule | None, dict[str, Any] | None]:
    """Return the first rule whose template of `side` fits the name, and what it read."""
    for rule in rules:
        values = rule.sides[side].read(name)
        if values is not None and rule.sides[1 - side].write(values) is not None:
            return rule, values
    return None, None


ANCHOR_GRID = (3, 3)  # aspect ratios, sizes: the nine anchors of RetinaNet


class _BackgroundFirst(Rows):
    """Class scores (K+1, ...): theirs begin with background, ours end with it."""

    def to_ours(self, rows: Tensor, facts: Facts) -> Tensor:
        return torch.cat([rows[1:], rows[:1]])

    def to_theirs(self, rows: Tensor, facts: Facts) -> Tensor:
        return torch.cat([rows[-1:], rows[:-1]])


class BackgroundRows(Rows):
    """Rows per class: theirs begin with rows of background, which nothing reads; ours have none.

    Args:
        per_class: rows of one class, 4 for boxes, 1 for masks.
    """

    def __init__(self, per_class: int) -> None:
        self.per_class = per_class

    def to_ours(self, rows: Tensor, facts: Facts) -> Tensor:
        """Return the rows without those of the background."""
        return rows[self.per_class :]

    def to_theirs(self, rows: Tensor, facts: Facts) -> Tensor:
        """Return the rows with zeros for the background in front."""
        if len(rows) != self.per_class * facts.classes:
            raise ValueError(
                f"torchvision's heads have {self.per_class} rows for each of the {facts.classes} "
                f"classes, got {len(rows)}: class-agnostic heads cannot be converted to torchvision"
            )
        return torch.cat([torch.zeros_like(rows[: self.per_class]), rows])


class _RatioMajor(Rows):
    """Rows per anchor: theirs go through the sizes first (fastest), ours through the ratios."""

    def to_ours(self, rows: Tensor, facts: Facts) -> Tensor:
        return self._swap(rows, facts, *ANCHOR_GRID)

    def to_theirs(self, rows: Tensor, facts: Facts) -> Tensor:
        return self._swap(rows, facts, *ANCHOR_GRID[::-1])

    @staticmethod
    def _swap(rows: Tensor, facts: Facts, slow: int, fast: int) -> Tensor:
        anchors = facts.anchors
        if all(anchors % n for n in range(2, anchors)):
            return rows  # one size or one ratio: there is only one order
        if anchors != slow * fast:
            raise ValueError(
                f"a head with {anchors} anchors per position: only {slow * fast} (3 sizes, 3 "
                "aspect ratios) and prime numbers can be converted, for the order of others is "
                "not known"
            )
        by_anchor = rows.unflatten(0, (slow, fast, -1))
        found: Tensor = by_anchor.transpose(0, 1).reshape(rows.shape)
        return found


BACKGROUND_FIRST = _BackgroundFirst()
RATIO_MAJOR = _RatioMajor()


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


_TOWER_WEIGHT = r"head\.(cls|bbox)_subnet\.\d+\.weight"


def _with_tower_bias(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Add a bias of 0 where a convolution of a tower has none: ours always have one."""
    result = dict(weights)
    for name, value in weights.items():
        bias = f"{name.removesuffix('weight')}bias"
        if re.fullmatch(_TOWER_WEIGHT, name) and bias not in weights:
            result[bias] = as_tensor(value).new_zeros(len(value))
    return result


def _without_tower_bias(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the biases of convolutions before a norm, which torchvision's have not."""
    result = dict(weights)
    if "head.cls_subnet.1.weight" not in weights:
        return result
    for name, value in weights.items():
        if not re.fullmatch(_TOWER_WEIGHT, name) or as_tensor(value).dim() == 1:
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
