"""Rank 1: configs from YAML files, with strict keys and a meaning for each of them."""

from d2kit.config.config import (
    CfgNode,
    configurable,
    downgrade_config,
    get_cfg,
    global_cfg,
    set_global_cfg,
    upgrade_config,
)
from d2kit.config.instantiate import allow_targets, instantiate
from d2kit.config.lazy import LazyCall, LazyConfig, trust_configs

__all__ = [
    "CfgNode",
    "LazyCall",
    "LazyConfig",
    "allow_targets",
    "configurable",
    "downgrade_config",
    "get_cfg",
    "global_cfg",
    "instantiate",
    "set_global_cfg",
    "trust_configs",
    "upgrade_config",
]
