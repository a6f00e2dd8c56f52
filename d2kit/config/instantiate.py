"""`instantiate`: builds the objects that a lazy config describes."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from d2kit.config.targets import (
    remember_target,
    require_omegaconf,
    resolve_target,
    sequence_type,
    target_name,
)

__all__ = ["dump_dataclass", "instantiate"]

TARGET, RECURSIVE = "_target_", "_recursive_"


def dump_dataclass(obj: Any) -> dict[str, Any]:
    """Return a dataclass instance as a dict that `instantiate` builds again.

    Args:
        obj: the instance; dataclasses inside it, also in lists and tuples, are dumped too.

    Raises:
        TypeError: if it is not an instance of a dataclass.
    """
    if isinstance(obj, type) or not dataclasses.is_dataclass(obj):
        raise TypeError(f"dump_dataclass expects an instance of a dataclass, got {obj!r}")

    def dump(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return dump_dataclass(value)
        if isinstance(value, (list, tuple)):
            return [dump(item) for item in value]
        return value

    fields = {field.name: dump(getattr(obj, field.name)) for field in dataclasses.fields(obj)}
    return {TARGET: remember_target(type(obj)), **fields}


def instantiate(cfg: Any) -> Any:
    """Call what a lazy config describes, innermost first.

    A mapping with the key ``_target_`` becomes the result of calling the target with the other
    entries as keyword arguments; these are instantiated before, unless ``_recursive_`` is false.
    Lists and tuples are instantiated element by element. All else is returned as it is, mappings
    without a target included.

    Args:
        cfg: a DictConfig, dict, list or any value. A target is a callable, put there by code, or
            text: the name of a callable in an allowed package, see `allow_targets`.

    Returns:
        The object that the config describes.

    Raises:
        ValueError: if a target is text that leads out of the allowed packages.
        ImportError: if there is no such object.
        TypeError: if a target is neither text nor callable, or does not take its arguments.
    """
    omegaconf = require_omegaconf()
    kind = sequence_type(cfg)
    if kind is not None:
        return kind(instantiate(item) for item in cfg)
    is_config = isinstance(cfg, omegaconf.DictConfig)
    if is_config and dataclasses.is_dataclass(omegaconf.OmegaConf.get_type(cfg)):
        return omegaconf.OmegaConf.to_object(cfg)
    if not isinstance(cfg, Mapping) or TARGET not in cfg:
        return cfg
    arguments = {key: cfg[key] for key in cfg if key not in (TARGET, RECURSIVE)}
    if cfg.get(RECURSIVE, True):
        arguments = {key: instantiate(value) for key, value in arguments.items()}
    target = cfg[TARGET]
    name = target if isinstance(target, str) else ""
    function = resolve_target(target) if isinstance(target, str) else target
    if not callable(function):
        raise TypeError(f"_target_ must be a callable or its name, got {target!r}")
    try:
        return function(**arguments)
    except TypeError:
        shown = name or target_name(function)
        logging.getLogger(__name__).error(
            "%s was called with the arguments %s", shown, sorted(map(str, arguments))
        )
        raise
