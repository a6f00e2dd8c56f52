"""Adds the keys of a project to a config that `get_cfg` made."""

import copy
from collections.abc import Mapping
from typing import Any

from d2kit.config._cfg_node import CfgNode


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
