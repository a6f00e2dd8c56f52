"""Conversion of configs between VERSION 1 (2019) and 2 (today)."""

from d2kit.config.cfg_node import CfgNode
from d2kit.config.versions import LATEST, downgrade_names, upgrade_names

__all__ = ["downgrade_config", "upgrade_config"]


def upgrade_config(cfg: CfgNode, to_version: int | None = None) -> CfgNode:
    """Convert a config to a newer version.

    Args:
        cfg: any config with VERSION; unchanged.
        to_version: None means the latest.

    Returns:
        A converted copy.

    Raises:
        ValueError: if there is no such version, or it is older than the config's.
    """
    version, target = cfg.VERSION, LATEST if to_version is None else to_version
    if target not in (1, LATEST) or version > target:
        raise ValueError(f"cannot upgrade a config of VERSION {version} to version {target}")
    converted = cfg.clone()
    if version < target:
        upgrade_names(converted)
    return converted


def downgrade_config(cfg: CfgNode, to_version: int) -> CfgNode:
    """Convert a config to an older version.

    Args:
        cfg: any config with VERSION; unchanged.
        to_version: 1 or 2.

    Returns:
        A converted copy.

    Raises:
        ValueError: if there is no such version, or it is newer than the config's.
    """
    version = cfg.VERSION
    if to_version not in (1, LATEST) or version < to_version:
        raise ValueError(f"cannot downgrade a config of VERSION {version} to version {to_version}")
    converted = cfg.clone()
    if version > to_version:
        downgrade_names(converted)
    return converted
