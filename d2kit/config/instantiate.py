"""`instantiate`: builds the objects that a lazy config describes."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any

from d2kit.utils.names import locate

__all__ = ["dump_dataclass", "instantiate"]


def require_omegaconf() -> Any:
    """Return the package omegaconf.

    Raises:
        ImportError: if it is not installed; the message says how to install it.
    """
    try:
        import omegaconf
    except ImportError as error:
        raise ImportError(
            "lazy configs need the package omegaconf: pip install 'd2kit[lazy]' "
            "(or: pip install 'omegaconf>=2.3')"
        ) from error
    return omegaconf


def _with_lists(value: Any) -> object:
    """Return nested dicts and lists with lists for tuples.

    What omegaconf 2.4 keeps as a tuple can only be replaced by another sequence, and a number
    often stands where several could.
    """
    if type(value) is dict:
        return {key: _with_lists(item) for key, item in value.items()}
    return [_with_lists(item) for item in value] if type(value) in (list, tuple) else value


def as_config(value: object) -> Any:
    """Return a dict as a DictConfig that may hold any object, and anything else unchanged."""
    if isinstance(value, dict):
        content = _with_lists(value)
        return require_omegaconf().DictConfig(content=content, flags={"allow_objects": True})
    return value


def sequence_type(value: object) -> type | None:
    """Return list or tuple for a sequence of Python or of omegaconf, None for anything else."""
    if isinstance(value, (list, tuple)):
        return tuple if isinstance(value, tuple) else list
    omegaconf = require_omegaconf()
    if isinstance(value, omegaconf.ListConfig):
        return list
    tuples = getattr(omegaconf, "TupleConfig", None)  # since 2.4; a ListConfig before
    return tuple if tuples is not None and isinstance(value, tuples) else None


ALLOWED = (
    *(f"d2kit.{part}" for part in ("layers", "structures", "modeling", "data", "solver")),
    *(f"d2kit.{part}" for part in ("evaluation", "tracking", "visualization", "contrib")),
    "project",
    *("torch.nn", "torch.optim", "torch.distributed.algorithms"),
    *(f"torch.utils.data.{part}" for part in ("dataloader", "dataset", "distributed", "sampler")),
    *(f"torchvision.{part}" for part in ("models", "ops", "transforms")),
    *("fvcore.common.param_scheduler", "fvcore.nn", "fvcore.transforms"),
)
"""Modules, with what is below them, whose functions and classes may be named.

Not the whole of torch and d2kit: ``torch.hub.load``, ``torch.load`` and ``LazyConfig.load`` can run
code out of files.
"""
SHORT_NAMES = ("torch.utils.data",)  # re-exports what is defined in the modules above
ORIGINAL, OURS = "detectron2", "d2kit"

_allowed = set(ALLOWED)
# names of objects that code has put into configs, and of containers
_given: dict[str, Any] = {f"builtins.{kind.__name__}": kind for kind in (dict, list, tuple, set)}


def allow_targets(*names: str) -> None:
    """Let configs name the functions and classes of more packages, in this process.

    Args:
        names: packages or modules; everything defined in them and below counts.

    Raises:
        ValueError: if one is not a dotted name.
    """
    for name in names:
        if not name or not all(part.isidentifier() for part in name.split(".")):
            raise ValueError(f"allow_targets expects names such as 'my_package', got {name!r}")
    _allowed.update(names)


def _inside(name: str, packages: set[str]) -> bool:
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


def _refusal(name: str, why: str) -> ValueError:
    package = name.split(".", maxsplit=1)[0] or name
    return ValueError(
        f"_target_ '{name}' is refused: {why}. A config may name what is defined in "
        f"{', '.join(sorted(_allowed))}; if you trust this one, call "
        f"d2kit.config.allow_targets('{package}') before"
    )


def resolve_target(name: str) -> Callable[..., Any]:
    """Return the callable that a config names.

    Names that start with ``detectron2.`` are looked up in d2kit.

    Args:
        name: a dotted path such as ``"torch.nn.Conv2d"``.

    Raises:
        ValueError: if it lies outside of the allowed packages (nothing is imported then), or is
            defined outside of them.
        ImportError: if there is no such object.
        TypeError: if it is not callable.
    """
    if name in _given:
        result: Callable[..., Any] = _given[name]
        return result
    wanted = name
    if name.startswith(f"{ORIGINAL}.") and not _inside(name, _allowed):
        wanted = OURS + name[len(ORIGINAL) :].replace(".projects.", ".contrib.", 1)
    if not _inside(wanted, _allowed | set(SHORT_NAMES)):
        raise _refusal(name, "it is not in an allowed package")
    if any(part.startswith("__") for part in wanted.split(".")):
        raise _refusal(name, "names with two underscores lead out of a package")
    found: Callable[..., Any] = locate(wanted)
    home = getattr(found, "__module__", None)
    if not isinstance(home, str) or not _inside(home, _allowed):
        raise _refusal(name, f"what it names is defined in '{home or type(found).__name__}'")
    if not callable(found):
        raise TypeError(f"_target_ '{name}' is a {type(found).__name__}, which cannot be called")
    return found


def remember_target(target: object) -> str:
    """Return the name of an object that code puts into a config; the name will lead back to it."""
    name = target_name(target)
    _given[name] = target
    return name


def target_name(target: object) -> str:
    """Return the shortest dotted path under which an object can be imported.

    ``torch.nn.Conv2d``, for example, though it is defined in ``torch.nn.modules.conv``.

    Args:
        target: a function, method or class; text is returned as it is.

    Raises:
        ValueError: for an object without a name, such as an instance.
    """
    if isinstance(target, str):
        return target
    home, name = getattr(target, "__module__", None), getattr(target, "__qualname__", None)
    if not isinstance(home, str) or not isinstance(name, str):
        raise ValueError(f"a {type(target).__name__} has no name that could be written: {target!r}")
    parts = home.split(".")
    for end in range(1, len(parts)):
        short = ".".join(parts[:end])
        if getattr(sys.modules.get(short), name, None) is target:
            return f"{short}.{name}"
    return f"{home}.{name}"


TARGET, RECURSIVE = "_target_", "_recursive_"


def dump_dataclass(obj: object) -> dict[str, Any]:
    """Return a dataclass instance as a dict that `instantiate` builds again.

    Args:
        obj: the instance; dataclasses inside it, also in lists and tuples, are dumped too.

    Raises:
        TypeError: if it is not an instance of a dataclass.
    """
    if isinstance(obj, type) or not dataclasses.is_dataclass(obj):
        raise TypeError(f"dump_dataclass expects an instance of a dataclass, got {obj!r}")

    def dump(value: object) -> object:
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
