"""`_C`: the default config, built from the table of keys in `d2kit.config.keys`."""

import copy

from d2kit.config.cfg_node import CfgNode
from d2kit.config.keys import KEYS

__all__ = ["_C"]


def _build() -> CfgNode:
    root = CfgNode()
    for name, key in KEYS.items():
        *sections, last = name.split(".")
        node = root
        for section in sections:
            node = node.setdefault(section, CfgNode())
        node[last] = copy.deepcopy(key.default)
    root.mark_defaults()
    return root


_C = _build()
