"""Names of config keys in VERSION 1 (2019) and 2 (today), on nested dicts."""

import logging
from collections.abc import Mapping
from typing import Any

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


def _set(tree: dict[str, Any], name: str, value: Any) -> None:
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
