"""The default config, `get_cfg`, `configurable`, the global config, and VERSION 1 and 2."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

from yacs.config import CfgNode as _YacsCfgNode

from d2kit.config.cfg_node import LATEST, CfgNode, downgrade_names, upgrade_names
from d2kit.config.keys import KEYS

__all__ = [
    "_C",
    "CfgNode",
    "configurable",
    "downgrade_config",
    "get_cfg",
    "global_cfg",
    "set_global_cfg",
    "upgrade_config",
]


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


def _is_config(value: object) -> bool:
    if isinstance(value, _YacsCfgNode):
        return True
    omegaconf = sys.modules.get("omegaconf")  # whoever holds a DictConfig has imported it
    return omegaconf is not None and isinstance(value, omegaconf.DictConfig)


def _called_with_config(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    return bool(args and _is_config(args[0])) or _is_config(kwargs.get("cfg"))


def _explicit(
    from_config: Callable[..., Mapping[str, Any]], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return the explicit arguments: those that `from_config` makes, then what it does not take."""
    parameters = inspect.signature(from_config).parameters
    if next(iter(parameters), None) != "cfg":
        raise TypeError(f"{from_config.__qualname__} must take 'cfg' as its first argument")
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    own = {name: v for name, v in kwargs.items() if takes_all or name in parameters}
    made = from_config(*args, **own)
    if not isinstance(made, Mapping):
        raise TypeError(
            f"{from_config.__qualname__} must return a dict of arguments, got {type(made).__name__}"
        )
    return {**made, **{name: v for name, v in kwargs.items() if name not in own}}


def _configurable_init(init: Callable[..., None]) -> Callable[..., None]:
    if init.__name__ != "__init__":
        raise TypeError(
            "@configurable without arguments is for __init__; "
            "for a function write @configurable(from_config=...)"
        )

    @functools.wraps(init)
    def wrapper(self: object, *args: object, **kwargs: object) -> None:
        if not _called_with_config(args, kwargs):
            init(self, *args, **kwargs)
            return
        owner = type(self)
        from_config = getattr(owner, "from_config", None)
        if from_config is None:
            raise AttributeError(
                f"{owner.__name__} was called with a config but has no classmethod 'from_config'"
            )
        if not inspect.ismethod(from_config):
            raise TypeError(f"{owner.__name__}.from_config must be a classmethod")
        init(self, **_explicit(from_config, args, kwargs))

    return wrapper


def configurable(
    init_func: Callable[..., Any] | None = None,
    *,
    from_config: Callable[..., Mapping[str, Any]] | None = None,
) -> Any:
    """Let a constructor or function with explicit arguments be called with a config instead.

    On ``__init__``, the class needs a classmethod ``from_config(cls, cfg, ...)`` that returns the
    arguments as a dict; on a function, ``@configurable(from_config=f)`` names such a function. A
    call whose first argument, or argument ``cfg``, is a `CfgNode` (or omegaconf's DictConfig) goes
    through it; keyword arguments that ``from_config`` takes are passed to it, others override its
    result. Any other call is unchanged.

    Args:
        init_func: the ``__init__`` to wrap.
        from_config: for functions: makes the arguments; its first argument is ``cfg``.

    Returns:
        The wrapped ``__init__``, or a decorator for functions, whose result has ``from_config``
        as an attribute.

    Raises:
        TypeError: if it is applied to something else.
        AttributeError: at the call, if the class has no ``from_config``.
    """
    if init_func is not None:
        if not inspect.isfunction(init_func) or from_config is not None:
            raise TypeError("write @configurable on __init__ or @configurable(from_config=...)")
        return _configurable_init(init_func)
    if from_config is None:
        return configurable
    if not callable(from_config):
        raise TypeError(f"from_config must be a function, got {type(from_config).__name__}")
    maker = from_config

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: object, **kwargs: object) -> object:
            if _called_with_config(args, kwargs):
                return function(**_explicit(maker, args, kwargs))
            return function(*args, **kwargs)

        wrapper.from_config = maker  # type: ignore[attr-defined]
        return wrapper

    return decorate


global_cfg = CfgNode()
"""A config that everybody can read; empty until `set_global_cfg`."""


def get_cfg() -> CfgNode:
    """Return a fresh config with all keys at their defaults."""
    found: CfgNode = _C.clone()
    return found


def set_global_cfg(cfg: CfgNode) -> None:
    """Make `global_cfg` a shallow copy of a config, in place.

    Args:
        cfg: the config to show to everybody.
    """
    global_cfg.clear()
    global_cfg.update(cfg)


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
    converted: CfgNode = cfg.clone()
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
    converted: CfgNode = cfg.clone()
    if version > to_version:
        downgrade_names(converted)
    return converted
