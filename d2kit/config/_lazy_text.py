"""Lazy configs as text: YAML for files, Python for readers, overrides from command lines."""

import copy
import dataclasses
from collections.abc import MutableMapping
from typing import Any

import yaml

from d2kit.config._omegaconf import as_config, require_omegaconf, sequence_type
from d2kit.config._targets import target_name
from d2kit.config._values import decode, plain_scalar
from d2kit.config.instantiate import dump_dataclass
from d2kit.utils.registry import nearest_names

TARGET = "_target_"
WIDTH = 100
_PLAIN = (str, int, float, bool, type(None))
_WORDS = {"true": True, "false": False, "null": None}


def _container(cfg: Any) -> Any:
    """Return a config of omegaconf as Python containers, interpolations as they are written."""
    omegaconf = require_omegaconf()
    if not omegaconf.OmegaConf.is_config(cfg):
        return cfg
    keep = omegaconf.SCMode.INSTANTIATE  # dataclasses stay what they are
    return omegaconf.OmegaConf.to_container(cfg, structured_config_mode=keep)


def _is_named(value: Any) -> bool:
    """Tell whether a callable can be found again under its name: no lambda, no inner function."""
    return callable(value) and "<" not in getattr(value, "__qualname__", "<")


def plain(value: Any, lost: list[str], path: str = "") -> Any:
    """Return a lazy config as dicts, lists and values that YAML can hold.

    Args:
        value: the config, or a part of it; targets become their names, dataclasses become calls.
        lost: gets the path of each value that cannot be written: of a function or class the name
            is written, of anything else its ``repr``.
        path: where `value` stands, for `lost`.
    """
    value = plain_scalar(_container(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dump_dataclass(value)
    if isinstance(value, dict):
        return {str(k): plain(v, lost, f"{path}.{k}".strip(".")) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, lost, f"{path}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, _PLAIN):
        return value
    is_target = path.rpartition(".")[2] == TARGET
    if not is_target or not _is_named(value):
        lost.append(path)
    return target_name(value) if _is_named(value) else repr(value)


def to_yaml(cfg: Any) -> tuple[str, list[str]]:
    """Return a lazy config as YAML, and the paths of the values that YAML cannot hold."""
    lost: list[str] = []
    text = yaml.safe_dump(plain(cfg, lost), sort_keys=False, width=WIDTH, allow_unicode=True)
    return text, lost


def _enclose(opening: str, parts: list[str], closing: str, indent: int) -> str:
    """Join the parts of an expression on one line, or one per line where it is too short."""
    line = opening + ", ".join(parts) + closing
    if len(line) + indent <= WIDTH and "\n" not in line:
        return line
    inner = "".join(f"{' ' * (indent + 4)}{part},\n" for part in parts)
    return f"{opening}\n{inner}{' ' * indent}{closing.lstrip(',')}"


def _expression(value: Any, indent: int) -> str:
    """Return a value as a Python expression that starts `indent` columns from the left."""
    if isinstance(value, dict):
        items = {key: _expression(item, indent + 4) for key, item in value.items() if key != TARGET}
        if TARGET in value:
            target = value[TARGET]
            name = target_name(target) if _is_named(target) else str(target)
            return _enclose(f"{name}(", [f"{k}={v}" for k, v in items.items()], ")", indent)
        return _enclose("{", [f"{k!r}: {v}" for k, v in items.items()], "}", indent)
    if isinstance(value, (list, tuple)):
        opening, closing = "()" if isinstance(value, tuple) else "[]"
        closing = f",{closing}" if isinstance(value, tuple) and len(value) == 1 else closing
        return _enclose(opening, [_expression(item, indent + 4) for item in value], closing, indent)
    return target_name(value) if _is_named(value) else repr(value)


def to_python(cfg: Any, prefix: str) -> str:
    """Return a lazy config as one assignment per value or call, for people to read.

    Args:
        cfg: the config.
        prefix: what each line starts with, for example ``"cfg."``.
    """
    lines: list[str] = []

    def walk(node: dict[Any, Any], path: str) -> None:
        for key, value in node.items():
            name = f"{path}{key}"
            if isinstance(value, dict) and value and TARGET not in value:
                walk(value, f"{name}.")
            else:
                lines.append(f"{name} = {_expression(value, 0)}")

    whole = _container(as_config(cfg))
    if TARGET in whole:
        return f"{prefix.rstrip('.')} = {_expression(whole, 0)}\n"
    walk(whole, prefix)
    return "\n".join(lines) + "\n"


def _value(text: str) -> Any:
    """Return what the right side of an override says: a Python literal, a YAML list, or text."""
    if text in _WORDS:
        return _WORDS[text]
    value = decode(text)
    if isinstance(value, str) and text[:1] in ("[", "{"):
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"override value '{text}' is neither Python nor YAML") from error
    return value


def _has(node: Any, part: str) -> bool:
    if sequence_type(node) is not None:
        return part.lstrip("-").isdigit() and -len(node) <= int(part) < len(node)
    return isinstance(node, MutableMapping) and part in node


def _set(cfg: Any, override: str) -> None:
    """Do one override in place."""
    name, equals, text = override.partition("=")
    add, name = name.startswith("+"), name.lstrip("+").strip()
    if not equals or not name:
        raise ValueError(
            f"override '{override}': expected KEY=VALUE, such as train.max_iter=1000, or "
            "+KEY=VALUE for a key that is not there yet"
        )
    *sections, last = name.replace("[", ".").replace("]", "").split(".")
    node, path = cfg, ""
    for part in sections:
        if not _has(node, part) and add and isinstance(node, MutableMapping):
            node[part] = as_config({})
        if not _has(node, part):
            raise KeyError(_unknown(override, part, path, node))
        node = node[int(part)] if sequence_type(node) is not None else node[part]
        path = f"{path}.{part}".lstrip(".")
    if sequence_type(node) is not None and _has(node, last):
        node[int(last)] = _value(text)
    elif isinstance(node, MutableMapping) and (last in node or add or TARGET in node):
        node[last] = _value(text)  # a call takes any argument; a wrong one is a TypeError there
    else:
        raise KeyError(_unknown(override, last, path, node))


def _unknown(override: str, part: str, path: str, node: Any) -> str:
    where = f"in '{path}'" if path else "at the top"
    if not isinstance(node, MutableMapping):
        length = f" of {len(node)}" if sequence_type(node) is not None else ""
        return (
            f"override '{override}': {where} is a {type(node).__name__}{length}, without '{part}'"
        )
    near = nearest_names(part, [str(key) for key in node])
    listed = f"nearest: {', '.join(near)}" if near else f"known: {', '.join(map(str, node))}"
    return f"override '{override}': no key '{part}' {where} ({listed}); +KEY=VALUE adds one"


def override(cfg: Any, overrides: list[str]) -> None:
    """Change a lazy config in place, see `LazyConfig.apply_overrides`; all of it or nothing."""
    for target in (copy.deepcopy(cfg), cfg):
        for text in overrides:
            _set(target, text)
