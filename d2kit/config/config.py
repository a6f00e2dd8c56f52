"""`CfgNode`, `get_cfg`, `configurable` and the global config."""

from d2kit.config._cfg_node import CfgNode
from d2kit.config._configurable import configurable
from d2kit.config.defaults import _C

__all__ = ["CfgNode", "configurable", "get_cfg", "global_cfg", "set_global_cfg"]

global_cfg = CfgNode()
"""A config that everybody can read; empty until `set_global_cfg`."""


def get_cfg() -> CfgNode:
    """Return a fresh config with all keys at their defaults."""
    return _C.clone()


def set_global_cfg(cfg: CfgNode) -> None:
    """Make `global_cfg` a shallow copy of a config, in place.

    Args:
        cfg: the config to show to everybody.
    """
    global_cfg.clear()
    global_cfg.update(cfg)
