"""Rank 1: configs from YAML files, with strict keys and a meaning for each of them."""

from d2kit.config.compat import downgrade_config, upgrade_config
from d2kit.config.config import CfgNode, configurable, get_cfg, global_cfg, set_global_cfg

__all__ = [
    "CfgNode",
    "configurable",
    "downgrade_config",
    "get_cfg",
    "global_cfg",
    "set_global_cfg",
    "upgrade_config",
]
