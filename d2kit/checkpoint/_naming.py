"""Names of the same weights in two libraries: one table of rules, read in both directions.

A rule pairs two templates, such as ``res{s}.{b}.conv{k}.*`` and ``layer{s-1}.{b}.conv{k}.*``. A
place in braces is a whole number, possibly scaled and shifted; ``*`` is the last part of a name
(``weight``, ``running_mean``). Where libraries order rows differently, the rule has a `Rows`.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Facts", "Naming", "Rows", "Rule", "Template"]

Change = Callable[[Mapping[str, Any]], dict[str, Any]]

_PLACE = re.compile(r"\{(?P<name>\w)(?:\*(?P<scale>\d+))?(?P<shift>[+-]\d+)?\}|\*")


class Template:
    """A pattern of names that can also make names.

    Args:
        text: see the module.
    """

    def __init__(self, text: str) -> None:
        self._pieces: list[str | tuple[str, int, int]] = []  # text, or (place, scale, shift)
        pattern, end = "", 0
        for found in _PLACE.finditer(text):
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


def as_tensor(value: Any) -> Tensor:
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
