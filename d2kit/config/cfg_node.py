"""`CfgNode`: a config, or a section of one; and the names of its keys in VERSION 1 (2019)."""

from __future__ import annotations

import copy
import logging
import os
from ast import literal_eval
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from fvcore.common.config import CfgNode as _FvcoreCfgNode

from d2kit.config.yaml import BASE_KEY, LEAF_TYPES, load_yaml
from d2kit.utils.names import AssertedKeyError, AssertedValueError, nearest_names

LATEST = 2

_RENAMED = {
    "MODEL.WEIGHT": "MODEL.WEIGHTS",
    "MODEL.PANOPTIC_FPN.SEMANTIC_LOSS_SCALE": "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT",
    "MODEL.PANOPTIC_FPN.RPN_LOSS_SCALE": "MODEL.RPN.LOSS_WEIGHT",
    "MODEL.PANOPTIC_FPN.INSTANCE_LOSS_SCALE": "MODEL.PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT",
    "MODEL.PANOPTIC_FPN.COMBINE_ON": "MODEL.PANOPTIC_FPN.COMBINE.ENABLED",
    "MODEL.PANOPTIC_FPN.COMBINE_OVERLAP_THRESHOLD": "MODEL.PANOPTIC_FPN.COMBINE.OVERLAP_THRESH",
    "MODEL.PANOPTIC_FPN.COMBINE_STUFF_AREA_LIMIT": "MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT",
    "MODEL.PANOPTIC_FPN.COMBINE_INSTANCES_CONFIDENCE_THRESHOLD": (
        "MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH"
    ),
    "MODEL.ROI_HEADS.SCORE_THRESH": "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
    "MODEL.ROI_HEADS.NMS": "MODEL.ROI_HEADS.NMS_THRESH_TEST",
    "MODEL.RETINANET.INFERENCE_SCORE_THRESHOLD": "MODEL.RETINANET.SCORE_THRESH_TEST",
    "MODEL.RETINANET.INFERENCE_TOPK_CANDIDATES": "MODEL.RETINANET.TOPK_CANDIDATES_TEST",
    "MODEL.RETINANET.INFERENCE_NMS_THRESHOLD": "MODEL.RETINANET.NMS_THRESH_TEST",
    "TEST.DETECTIONS_PER_IMG": "TEST.DETECTIONS_PER_IMAGE",
    "TEST.AUG_ON": "TEST.AUG.ENABLED",
    "TEST.AUG_MIN_SIZES": "TEST.AUG.MIN_SIZES",
    "TEST.AUG_MAX_SIZE": "TEST.AUG.MAX_SIZE",
    "TEST.AUG_FLIP": "TEST.AUG.FLIP",
}
"""Full names in version 1 -> in version 2, same meaning."""

_ANCHORS = {"ANCHOR_SIZES": "SIZES", "ANCHOR_ASPECT_RATIOS": "ASPECT_RATIOS"}
"""Keys of MODEL.RPN or MODEL.RETINANET in version 1 -> of MODEL.ANCHOR_GENERATOR in version 2."""

_MISSING = object()


def _get(tree: Mapping[str, Any], name: str) -> Any:
    node: Any = tree
    for part in name.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return _MISSING
        node = node[part]
    return node


def _set(tree: dict[str, Any], name: str, value: object) -> None:
    *sections, last = name.split(".")
    for section in sections:
        tree = tree.setdefault(section, type(tree)())
    tree[last] = value


def _delete(tree: dict[str, Any], name: str) -> None:
    """Delete a key and the sections that it leaves empty."""
    section, _, last = name.rpartition(".")
    parent = _get(tree, section) if section else tree
    del parent[last]
    if section and not parent:
        _delete(tree, section)


def _old_anchor_section(tree: Mapping[str, Any]) -> str:
    return "RETINANET" if _get(tree, "MODEL.META_ARCHITECTURE") == "RetinaNet" else "RPN"


def _is_old(tree: Mapping[str, Any]) -> bool:
    """Tell whether there is a key that exists in version 1 only."""
    anchors = (f"MODEL.{s}.{key}" for s in ("RPN", "RETINANET") for key in _ANCHORS)
    return any(_get(tree, name) is not _MISSING for name in (*_RENAMED, *anchors))


def _rename(tree: dict[str, Any], old: str, new: str) -> None:
    value = _get(tree, old)
    if value is not _MISSING:
        _delete(tree, old)
        _set(tree, new, value)


def upgrade_names(tree: dict[str, Any]) -> None:
    """Turn version 1 names into version 2 names, in place."""
    used = _old_anchor_section(tree)
    for old, new in _RENAMED.items():
        _rename(tree, old, new)
    for section in ("RPN", "RETINANET"):
        for old, new in _ANCHORS.items():
            value = _get(tree, f"MODEL.{section}.{old}")
            if value is _MISSING:
                continue
            _delete(tree, f"MODEL.{section}.{old}")
            if section == used:
                nested = bool(value) and isinstance(value[0], (list, tuple))
                _set(tree, f"MODEL.ANCHOR_GENERATOR.{new}", value if nested else [value])
    tree["VERSION"] = 2


def downgrade_names(tree: dict[str, Any]) -> None:
    """Turn version 2 names into version 1 names, in place."""
    section = _old_anchor_section(tree)
    for old, new in _RENAMED.items():
        _rename(tree, new, old)
    for old, new in _ANCHORS.items():
        _rename(tree, f"MODEL.ANCHOR_GENERATOR.{new}", f"MODEL.{section}.{old}")
    tree["VERSION"] = 1


def upgrade_values(
    values: dict[str, Any], source: str, origins: dict[str, str] | None = None
) -> dict[str, Any]:
    """Convert what a config file says to the latest version, in place.

    Args:
        values: nested dicts, as read; without VERSION the version is guessed from the names.
        source: the file, for messages.
        origins: full key -> place; follows the renames.

    Returns:
        `values`.

    Raises:
        ValueError: if VERSION is not 1 or 2.
    """
    old = _is_old(values)
    version = values.get("VERSION", 1 if old else LATEST)
    if version not in (1, LATEST):
        raise ValueError(f"{source}: VERSION is {version!r}; this d2kit reads versions 1 and 2")
    if version == 1 and old:
        logging.getLogger(__name__).warning(
            "Config '%s' is of version 1; its keys were converted to version %d", source, LATEST
        )
        if origins is not None:
            section = _old_anchor_section(values)
            anchors = {
                f"MODEL.{section}.{old}": f"MODEL.ANCHOR_GENERATOR.{new}"
                for old, new in _ANCHORS.items()
            }
            renamed = {**_RENAMED, **anchors}
            origins.update({n: origins[o] for o, n in renamed.items() if o in origins})
        upgrade_names(values)
    elif version == 1:
        values["VERSION"] = LATEST
    return values


def decode(value: object) -> object:
    """Return what a string says as a Python literal, and anything else unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return value


def plain_scalar(value: Any) -> Any:
    """Return a numpy or torch scalar as a Python number, in lists too; the rest unchanged."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    if type(value) in (list, tuple):
        plain = [plain_scalar(item) for item in value]
        if any(new is not old for new, old in zip(plain, value, strict=True)):
            return type(value)(plain)
    return value


def _as(kind: type, value: Any, current: Any) -> Any:
    """Return a sequence as a list or tuple; the inner ones too, where they are all of one type."""
    inner = {type(item) for item in current}
    if inner in ({list}, {tuple}):
        like = inner.pop()
        value = [like(item) if isinstance(item, (list, tuple)) else item for item in value]
    return kind(value)


def _kind(value: object) -> str:
    return "section" if isinstance(value, dict) else type(value).__name__


def coerce(value: Any, raw: object, current: object, full: str, where: str) -> object:
    """Return `value` as it may replace `current`.

    Equal types pass; so does anything for None, None for anything but an int, an int where a
    float is, a whole float where an int is, a list where a tuple is and the reverse. Text for a
    string key is kept as it was written where it
    happens to be a literal of another type (an output folder named ``2024``).

    Args:
        value: the new value, decoded.
        raw: the new value as it was given.
        current: the value to be replaced.
        full: full name of the key.
        where: file and line, or another source, for the message.

    Raises:
        ValueError: if the types do not agree.
    """
    new, old = type(value), type(current)
    leaves = new in LEAF_TYPES and old in LEAF_TYPES
    if old in (list, tuple) and new in (list, tuple):
        return _as(old, value, current)
    if new is old or current is None and leaves or value is None and old is not int:
        return value
    if old is float and new is int:
        return float(value)
    if old is int and new is float and value.is_integer():
        return int(value)
    if old is str and isinstance(raw, str):
        return raw
    hint = ""
    if old in (list, tuple) and new in (str, int, float):
        hint = f'; for one element write "({value!r},)" with the comma, or "[{value!r}]"'
    raise ValueError(
        f"{where}: {full} expects a {_kind(current)} (now {current!r}), "
        f"got the {_kind(value)} {value!r}{hint}"
    )


def _edits(a: str, b: str, limit: int) -> int:
    """Return the number of inserted, deleted, replaced or swapped characters, at most limit + 1."""
    if abs(len(a) - len(b)) > limit:
        return limit + 1
    rows = [list(range(len(b) + 1))]
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            best = min(rows[-1][j] + 1, row[j - 1] + 1, rows[-1][j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                best = min(best, rows[-2][j - 2] + 1)
            row.append(best)
        rows.append(row)
    return min(rows[-1][-1], limit + 1)


def looks_like_typo(name: str, known: str) -> bool:
    """Tell whether a new key's name is so near a known one that it must be a slip.

    Names that differ in a digit are taken for members of a series (RES4_DILATION beside
    RES5_DILATION).
    """
    a, b = (text.replace("_", "").upper() for text in (name, known))
    if a == b:
        return True
    if [c for c in a if c.isdigit()] != [c for c in b if c.isdigit()]:
        return False
    shorter = min(len(a), len(b))
    if shorter < 4:
        return False
    limit = 2 if shorter >= 8 else 1
    return _edits(a, b, limit) <= limit


_SECTION = "__section__"  # instance attribute: (name of the section, its default keys)


class CfgNode(_FvcoreCfgNode):
    """A section of a config: a dict whose keys are also attributes.

    Files are plain YAML and may name other files of the same tree as ``_BASE_``. Reading a file or
    a list changes existing keys only; an unknown one is an error that lists the nearest names, and
    leaves the config as it was. From Python new keys and sections may be added, but not a value
    whose name is a slip of a default key's (see `__setattr__`).

    Args:
        init_dict: keys and values; nested dicts become sections.
        key_list: names of the sections above, for messages.
        new_allowed: whether merging may add keys.
    """

    def __init__(
        self,
        init_dict: dict[str, Any] | None = None,
        key_list: list[str] | None = None,
        new_allowed: bool = False,
    ) -> None:
        super().__init__(init_dict, key_list, new_allowed)

    # ---- attributes -------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(self._no_key(name))

    def __missing__(self, name: object) -> Any:
        """Say what is wrong with ``cfg["NAME"]``; ``cfg.get("NAME")`` is None, as of any dict."""
        raise KeyError(self._no_key(str(name)))

    def _no_key(self, name: str) -> str:
        section, _ = self.__dict__.get(_SECTION, ("", ()))
        near = [*self._below(name), *nearest_names(name, (str(key) for key in self))]
        listed = f"nearest: {', '.join(near)}" if near else "none is similar"
        return f"config section '{section or 'cfg'}' has no key '{name}' ({listed})"

    def _below(self, name: str) -> list[str]:
        """Return the first keys in sections below this one that have this very name."""
        section, _ = self.__dict__.get(_SECTION, ("", ()))
        start = f"{section}." if section else ""
        return [f"{start}{key}" for key in self._full_keys() if key.endswith(f".{name}")][:4]

    def __setattr__(self, name: str, val: object) -> None:
        """Set a key; new ones are allowed unless the name is a slip.

        A new value (not a section) is refused where its name differs from a default key of the
        same section only in case, underscores or up to two letters (one, where the shorter name
        has fewer than 8; digits do not count as letters), for example ``NUM_CLASS`` beside
        ``NUM_CLASSES``. ``cfg.SECTION["NAME"] = value`` or `set_new_allowed(True)` set it anyway.
        A name that exists in a section below (``cfg.MODEL.NUM_CLASSES``) is a warning.

        The new value of an existing key must fit the present one by the rules of a config file
        (`coerce`): text for a number is read as one, a text for a tuple of names is an error.

        Raises:
            AttributeError: if the config is frozen or the name is refused.
            TypeError: if the value is none that a config file can hold.
            ValueError: if the value is of another type than the key's.
        """
        val = plain_scalar(val)
        if type(val) not in LEAF_TYPES and not isinstance(val, dict):
            raise TypeError(
                f"config key '{name}' got a {type(val).__name__} ({val!r}); expected a number, "
                "string, bool, None, list, tuple or CfgNode"
            )
        if name in self and not self.is_frozen():
            val = self._checked(name, val)
        elif name not in self and not isinstance(val, dict) and not self.is_new_allowed():
            section, defaults = self.__dict__.get(_SECTION, ("", ()))
            slips = [key for key in defaults if key in self and looks_like_typo(name, key)]
            if slips:
                raise AttributeError(
                    f"config section '{section or 'cfg'}' has no key '{name}', did you mean "
                    f"{' or '.join(repr(s) for s in slips)}? To add a key of this name all the "
                    f"same, write cfg[...]['{name}'] = value"
                )
            if defaults and (below := self._below(name)):
                logging.getLogger(__name__).warning(
                    "New config key '%s' in section '%s', which nothing in d2kit reads; did you "
                    "mean %s?",
                    name,
                    section or "cfg",
                    " or ".join(below),
                )
        super().__setattr__(name, val)

    def _checked(self, name: str, val: object) -> object:
        """Return a new value of an existing key as a config file would set it."""
        if isinstance(val, dict) or isinstance(self[name], dict):
            return val
        section, _ = self.__dict__.get(_SECTION, ("", ()))
        full = f"{section}.{name}" if section else name
        return coerce(decode(val), val, self[name], full, "set from Python")

    def mark_defaults(self, section: str = "") -> None:
        """Remember the present keys as the defaults that slips are compared with.

        Args:
            section: the name of this section; empty for the whole config.
        """
        self.__dict__[_SECTION] = (section, frozenset(self))
        for key, value in self.items():
            if isinstance(value, CfgNode):
                value.mark_defaults(f"{section}.{key}" if section else key)

    # ---- reading ----------------------------------------------------------------------------

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict[str, Any]:
        """Return the values of a YAML file merged over those of its `_BASE_` files.

        Args:
            filename: a local path.
            allow_unsafe: accepted for compatibility; files that would run code are refused.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: if a file is malformed, unsafe, or its base outside of the config tree.
        """
        return load_yaml(filename).values

    def merge_from_file(
        self, cfg_filename: str | os.PathLike[str], allow_unsafe: bool = True
    ) -> None:
        """Take over the values of a YAML file and its `_BASE_` files.

        A file written for an older VERSION is converted.

        Args:
            cfg_filename: a local path.
            allow_unsafe: accepted for compatibility; files that would run code are refused.

        Raises:
            FileNotFoundError: if a file is missing.
            KeyError: if a key is unknown; with file, line and the nearest names.
            ValueError: if a file is malformed or unsafe, or a value has the wrong type.
        """
        values, origins = load_yaml(cfg_filename)
        if "VERSION" in self:
            values = upgrade_values(values, str(cfg_filename), origins)
        self._merge(values, str(cfg_filename), origins)

    def merge_from_other_cfg(self, cfg_other: Mapping[str, Any]) -> None:
        """Take over the values of another config.

        Raises:
            KeyError: if a key is unknown here.
            ValueError: if a value has the wrong type.
        """
        self._merge(cfg_other, "the other config", {})

    def merge_from_list(self, cfg_list: Sequence[Any]) -> None:
        """Take over values given as ``[key, value, key, value, ...]``.

        Args:
            cfg_list: full key names, each followed by its value; a string is read as a Python
                literal where it is one (``"0.01"``, ``"(1, 2)"``, ``"None"``).

        Raises:
            KeyError: if a key is unknown; the message lists the nearest names.
            ValueError: if a value is missing or has the wrong type.
        """
        if len(cfg_list) % 2:
            raise AssertedValueError(
                f"config overrides: expected KEY VALUE pairs separated by spaces, got "
                f"{len(cfg_list)} items: {list(cfg_list)}"
            )
        changes: list[tuple[CfgNode, str, Any]] = []
        for full, value in zip(cfg_list[::2], cfg_list[1::2], strict=True):
            *sections, key = str(full).split(".")
            node: Any = self
            for section in sections:
                node = node[section] if isinstance(node, CfgNode) and section in node else None
            if not isinstance(node, CfgNode) or key not in node:
                if self._skip_or_rename(str(full)):
                    continue
                raise self._unknown(str(full), "config overrides")
            where = "config overrides"
            changes.append((node, key, coerce(decode(value), value, node[key], str(full), where)))
        self._apply(changes)

    # ---- merging ----------------------------------------------------------------------------

    def _full_keys(self, prefix: str = "") -> list[str]:
        names = []
        for key, value in self.items():
            names.append(f"{prefix}{key}")
            if isinstance(value, CfgNode):
                names += value._full_keys(f"{prefix}{key}.")
        return names

    def _unknown(self, full: str, where: str) -> AssertedKeyError:
        near = nearest_names(full, self._full_keys())
        listed = f"nearest: {', '.join(near)}" if near else "no key is similar"
        return AssertedKeyError(f"{where}: unknown config key '{full}' ({listed})")

    def _new_value(self, value: object) -> object:
        if isinstance(value, dict):
            return type(self)(copy.deepcopy(dict(value)))
        return decode(value)

    def _skip_or_rename(self, full: str) -> bool:
        """Tell whether a key is deprecated (and skipped); raise if it was renamed."""
        if self.key_is_renamed(full):
            self.raise_key_rename_error(full)
        return bool(self.key_is_deprecated(full))

    def _merge(self, values: Mapping[str, Any], source: str, origins: Mapping[str, str]) -> None:
        """Check all of `values`, then take them over; an error leaves this config unchanged."""
        if BASE_KEY in values:
            raise KeyError(f"{source}: '{BASE_KEY}' is for files only")
        changes: list[tuple[CfgNode, str, Any]] = []

        def walk(new: Mapping[str, Any], node: CfgNode, prefix: str) -> None:
            for key, value in new.items():
                full = f"{prefix}{key}"
                where = origins.get(full, source)
                if key not in node:
                    if node.is_new_allowed():
                        changes.append((node, key, self._new_value(value)))
                    elif not self._skip_or_rename(full):
                        raise self._unknown(full, where)
                elif isinstance(value, dict) and isinstance(node[key], CfgNode):
                    walk(value, node[key], f"{full}.")
                else:
                    changes.append(
                        (node, key, coerce(decode(value), value, node[key], full, where))
                    )

        walk(values, self, "")
        self._apply(changes)

    def _apply(self, changes: list[tuple[CfgNode, str, Any]]) -> None:
        if changes and self.is_frozen():
            raise AttributeError("the config is frozen; call cfg.defrost() before merging into it")
        for node, key, value in changes:
            node[key] = copy.deepcopy(value)

    # ---- writing ----------------------------------------------------------------------------

    def dump(self, *args: Any, **kwargs: Any) -> Any:
        """Return the config as YAML that `merge_from_file` reads back to the same values.

        Args:
            args: passed to ``yaml.safe_dump``.
            kwargs: passed to ``yaml.safe_dump``.

        Raises:
            ValueError: if a value is neither a number, a string, a bool, None, a list nor a tuple.
        """

        def plain(value: object, full: str) -> object:
            if isinstance(value, dict):
                return {key: plain(v, f"{full}.{key}" if full else key) for key, v in value.items()}
            if isinstance(value, (list, tuple)):
                return [plain(v, full) for v in value]
            value = plain_scalar(value)
            if type(value) not in LEAF_TYPES:
                raise ValueError(f"{full} holds a {type(value).__name__}, YAML cannot: {value!r}")
            return value

        return yaml.safe_dump(plain(self, ""), *args, **kwargs)


def add_keys(cfg: CfgNode, keys: Mapping[str, tuple[Any, str]]) -> None:
    """Add keys, or give them other defaults, in place; missing sections are made.

    Args:
        cfg: not frozen.
        keys: full name -> (default, meaning).
    """
    for name, (default, _) in keys.items():
        *sections, last = name.split(".")
        node = cfg
        for section in sections:
            if section not in node:
                node[section] = CfgNode()
            node = node[section]
        node[last] = copy.deepcopy(default)
