"""Lazy configs: configs that are Python code, whose calls are made when `instantiate` says so.

They need the package omegaconf: ``pip install 'd2kit[lazy]'``.
"""

from __future__ import annotations

import builtins
import copy
import dataclasses
import importlib.abc
import importlib.util
import inspect
import itertools
import logging
import os
import re
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import yaml

from d2kit.config.cfg_node import decode, plain_scalar
from d2kit.config.instantiate import (
    as_config,
    dump_dataclass,
    remember_target,
    require_omegaconf,
    sequence_type,
    target_name,
)
from d2kit.config.yaml import load_yaml, zoo_folder
from d2kit.utils.file_io import atomic_write
from d2kit.utils.names import nearest_names

if TYPE_CHECKING:
    from collections.abc import Callable

    from omegaconf import DictConfig

__all__ = ["LazyCall", "LazyConfig"]


TARGET = "_target_"
WIDTH = 100
_PLAIN = (str, int, float, bool, type(None))
_WORDS = {"true": True, "false": False, "null": None}


def _container(cfg: object) -> Any:
    """Return a config of omegaconf as Python containers, interpolations as they are written."""
    omegaconf = require_omegaconf()
    if not omegaconf.OmegaConf.is_config(cfg):
        return cfg
    keep = omegaconf.SCMode.INSTANTIATE  # dataclasses stay what they are
    return omegaconf.OmegaConf.to_container(cfg, structured_config_mode=keep)


def _is_named(value: object) -> bool:
    """Tell whether a callable can be found again under its name: no lambda, no inner function."""
    return callable(value) and "<" not in getattr(value, "__qualname__", "<")


def plain(value: object, lost: list[str], path: str = "") -> object:
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


def to_yaml(cfg: object) -> tuple[str, list[str]]:
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


def _expression(value: object, indent: int) -> str:
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


def to_python(cfg: object, prefix: str) -> str:
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


def override(cfg: object, overrides: list[str]) -> None:
    """Change a lazy config in place, see `LazyConfig.apply_overrides`; all of it or nothing."""
    for target in (copy.deepcopy(cfg), cfg):
        for text in overrides:
            _set(target, text)


VARIABLE = "D2KIT_TRUSTED_CONFIGS"

_trusted: set[Path] = set()
_numbers = itertools.count()


def trust_configs(*folders: str | os.PathLike[str]) -> None:
    """Let Python configs in some folders be executed by whoever loads them, in this process.

    Args:
        folders: existing folders, or single files.

    Raises:
        FileNotFoundError: if one does not exist.
    """
    for folder in folders:
        if not Path(folder).exists():
            raise FileNotFoundError(f"trust_configs: there is no '{folder}'")
    _trusted.update(Path(folder).resolve() for folder in folders)


def check_trusted(file: Path) -> None:
    """Raise an error unless a file lies in a folder that is trusted.

    These are d2kit's own configs, what `trust_configs` was told, and the folders that the
    environment variable ``D2KIT_TRUSTED_CONFIGS`` names. Links are followed first.

    Raises:
        PermissionError: if it does not.
    """
    named = [Path(n).resolve() for n in os.environ.get(VARIABLE, "").split(os.pathsep) if n]
    real = file.resolve()
    if any(real.is_relative_to(root) for root in (zoo_folder().resolve(), *_trusted, *named)):
        return
    raise PermissionError(
        f"config file '{file}' is a Python program, and loading it would execute it. If it is "
        f"yours, or you have read it and trust it: LazyConfig.load('{file}', trust=True), or "
        f"d2kit.config.trust_configs('{real.parent}') once in a script, or {VARIABLE}="
        f"{real.parent} in the environment (scripts: --trust-config)"
    )


class _Source(importlib.abc.SourceLoader):
    """Python's own loader of source text, without compiled copies on the disk."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def get_filename(self, fullname: str) -> str:
        return str(self.file)

    def get_data(self, path: str | bytes) -> bytes:
        return Path(os.fsdecode(path)).read_bytes()


def _find(name: str, folder: Path, importer: Path) -> Path:
    """Return the file of a relative import.

    Raises:
        ImportError: if there is none; the nearest names are listed.
    """
    *above, last = name.split(".")
    where = folder.joinpath(*above)
    file = where / f"{last}.py"
    if file.is_file():
        return file
    if (where / last).is_dir():
        raise ImportError(
            f"{importer}: relative import of the folder '{where / last}'; name a file in it"
        )
    near = nearest_names(last, [f.stem for f in where.glob("*.py")])
    listed = f"nearest there: {', '.join(near)}" if near else "nothing there is like it"
    raise ImportError(f"{importer}: no config file '{file}' to import ({listed})")


def _importer(file: Path, chain: tuple[Path, ...]) -> Callable[..., Any]:
    """Return an ``__import__`` for a config file: relative names are files beside it.

    Each import runs the file anew, so that whoever changes what was imported changes a copy of
    its own, and dicts become DictConfigs.
    """

    def load(name: str, folder: Path) -> SimpleNamespace:
        values = run_config_file(_find(name, folder, file), chain)
        return SimpleNamespace(**{key: as_config(value) for key, value in values.items()})

    def config_import(
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> Any:
        if level == 0:
            return builtins.__import__(name, globals, locals, fromlist or (), 0)
        folder = file.parents[level - 1]
        if name:
            return load(name, folder)
        return SimpleNamespace(**{part: load(part, folder) for part in fromlist or ()})

    return config_import


def run_config_file(file: Path, chain: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Execute a Python config file and return its variables.

    The caller has checked that it is trusted; what it imports is trusted with it.

    Args:
        file: the file.
        chain: the files that are being executed and led here by imports.

    Raises:
        ImportError: if config files import each other in a circle, or one is missing.
    """
    file = file.resolve()
    if file in chain:
        circle = " -> ".join(map(str, (*chain[chain.index(file) :], file)))
        raise ImportError(f"config files import each other in a circle: {circle}")
    name = f"_d2kit_config_{next(_numbers)}_{file.stem}"
    spec = importlib.util.spec_from_loader(name, _Source(file), origin=str(file))
    if spec is None or spec.loader is None:
        raise ImportError(f"'{file}' cannot be loaded as Python source")
    module = ModuleType(name)
    module.__file__ = str(file)
    scope = {**vars(builtins), "__import__": _importer(file, (*chain, file))}
    vars(module)["__builtins__"] = scope
    sys.modules[name] = module  # dataclasses look their module up while they are defined
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    hidden = {"__builtins__", "__file__", *vars(ModuleType(name))}
    return {key: value for key, value in vars(module).items() if key not in hidden}


YAML = (".yaml", ".yml")
CONTAINERS = (dict, list, tuple, set)


class LazyCall:
    """Describes a call instead of making it: ``LazyCall(torch.nn.Conv2d)(in_channels=3, ...)``.

    Args:
        target: a function or class, or the dotted name of one in an allowed package.

    Raises:
        TypeError: if it is neither callable nor text.
    """

    def __init__(self, target: Callable[..., Any] | str) -> None:
        if not callable(target) and not isinstance(target, str):
            raise TypeError(f"LazyCall expects a callable or the name of one, got {target!r}")
        self._target = target

    def __call__(self, **kwargs: object) -> DictConfig:
        """Return the described call, to be changed like any config and made by `instantiate`.

        Args:
            kwargs: the arguments of the call; other described calls may be among them.
        """
        target = self._target
        if target in CONTAINERS or dataclasses.is_dataclass(target):
            target = remember_target(target)  # omegaconf would take the class for a schema
        found: DictConfig = as_config({TARGET: target, **kwargs})
        return found


def _is_public_config(name: str, value: object) -> bool:
    """Tell whether a variable of a Python config belongs to it: its containers, no helpers."""
    holds = isinstance(value, Mapping) or sequence_type(value) is not None
    return holds and not name.startswith("_")


def refuse_resolvers(
    value: object, origins: Mapping[str, str], filename: str, full: str = ""
) -> None:
    """Raise ValueError for ``${name:...}`` in a file: it would read this machine's environment.

    References to other keys, ``${model.num_classes}``, are data and stay.

    Args:
        value: what the file says.
        origins: full key -> file and line.
        filename: of the file, for keys without a line.
        full: name of the key that has the value.
    """
    if isinstance(value, Mapping):
        for key, inner in value.items():
            refuse_resolvers(inner, origins, filename, f"{full}.{key}" if full else str(key))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            refuse_resolvers(inner, origins, filename, full)
    elif isinstance(value, str) and _calls_resolver(value):
        raise ValueError(
            f"{origins.get(full, filename)}: {full}: {value!r:.80} calls a resolver of omegaconf "
            "(oc.env reads the environment); a YAML file is data: write the value, or set it from "
            "a .py config or the command line"
        )


def _calls_resolver(text: str) -> bool:
    """Whether a colon stands between ``${`` and its ``}``."""
    depth = 0
    for part in re.findall(r"\$\{|[}:]", text):
        if part == ":" and depth:
            return True
        depth = max(depth + (part == "${") - (part == "}"), 0)
    return False


def _select(values: dict[str, Any], keys: str | tuple[str, ...] | None, file: str) -> Any:
    """Return the variables that a caller asked for, or all."""
    if keys is None:
        return as_config(values)
    wanted = (keys,) if isinstance(keys, str) else tuple(keys)
    for key in wanted:
        if key not in values:
            near = nearest_names(key, [str(name) for name in values])
            raise KeyError(f"'{file}' has no '{key}' (nearest: {', '.join(near) or 'none'})")
    found = tuple(as_config(values[key]) for key in wanted)
    return found[0] if isinstance(keys, str) else found


class LazyConfig:
    """Reads, writes and changes lazy configs; there are no instances.

    A ``.py`` config is a program. It is executed only if its loader says that it is trusted, or if
    it lies in a folder that is: d2kit's own configs, the folders given to
    `d2kit.config.trust_configs`, and those that ``D2KIT_TRUSTED_CONFIGS`` names. In it, relative
    imports reach the files beside it (``from ..common.optim import SGD``); each import gives a
    copy of its own. A ``.yaml`` config is data and never executed.
    """

    @staticmethod
    def load_rel(filename: str, keys: str | tuple[str, ...] | None = None) -> DictConfig:
        """Load a config file that lies beside the code that calls this.

        It is trusted, as the caller's own code is.

        Args:
            filename: path relative to the folder of the calling file.
            keys: see `load`.

        Raises:
            ValueError: if the path is absolute, or the caller is no file.
        """
        frame = inspect.currentframe()
        caller = frame.f_back.f_code.co_filename if frame and frame.f_back else "<unknown>"
        if os.path.isabs(filename) or caller.startswith("<"):
            raise ValueError(
                f"LazyConfig.load_rel('{filename}') from '{caller}': expected a relative path and "
                "a calling file; use LazyConfig.load"
            )
        file = str(Path(caller).parent / filename)
        loaded: DictConfig = LazyConfig.load(file, keys, trust=True)
        return loaded

    @staticmethod
    def load(
        filename: str, keys: str | tuple[str, ...] | None = None, *, trust: bool = False
    ) -> Any:
        """Load a config file.

        Args:
            filename: local path of a ``.py`` or ``.yaml`` file.
            keys: name of one variable to return, or names of several.
            trust: execute a ``.py`` file wherever it lies.

        Returns:
            A DictConfig of what is in the file (of a ``.py`` file the dicts, lists and tuples whose
            names do not start with an underscore); with `keys`, one variable or a tuple of them.

        Raises:
            PermissionError: if a ``.py`` file is not trusted; the message says how to trust it.
            FileNotFoundError: if there is no such file.
            KeyError: if a name of `keys` is not in it.
            ValueError: for another kind of file, or malformed YAML.
        """
        require_omegaconf()
        file = Path(filename)
        if file.suffix in YAML:
            from omegaconf.errors import OmegaConfBaseException

            loaded = load_yaml(file)
            refuse_resolvers(loaded.values, loaded.origins, filename)
            try:
                return _select(loaded.values, keys, filename)
            except OmegaConfBaseException as error:  # a reference that cannot be parsed
                raise ValueError(f"{filename}: {str(error).partition(chr(10))[0]}") from error
        if file.suffix != ".py":
            raise ValueError(f"lazy config '{filename}': expected a .py or .yaml file")
        if not file.is_file():
            near = nearest_names(file.name, [f.name for f in file.parent.glob("*.py")])
            listed = f"nearest there: {', '.join(near)}" if near else "nothing there is like it"
            raise FileNotFoundError(f"lazy config '{filename}' not found ({listed})")
        if not trust:
            check_trusted(file)
        values = run_config_file(file)
        if keys is None:
            values = {k: as_config(v) for k, v in values.items() if _is_public_config(k, v)}
        return _select(values, keys, filename)

    @staticmethod
    def save(cfg: object, filename: str) -> None:
        """Write a config as YAML, which `load` reads without executing anything.

        Targets are written as their names. Functions and classes elsewhere, and values that YAML
        cannot hold, are written as text, and a warning lists them: the file then documents the
        run, but does not rebuild it.

        Args:
            cfg: the config.
            filename: the target.
        """
        text, lost = to_yaml(cfg)
        if lost:
            logging.getLogger(__name__).warning(
                "%s holds %s as text only; load the Python config to build them again",
                filename,
                ", ".join(lost),
            )
        with atomic_write(filename, "w") as stream:
            stream.write(text)

    @staticmethod
    def apply_overrides(cfg: DictConfig, overrides: list[str]) -> DictConfig:
        """Change values of a config in place.

        Args:
            cfg: the config.
            overrides: ``KEY=VALUE`` each, keys dotted, list elements by number
                (``train.max_iter=100``, ``dataloader.train.mapper.augmentations.0.p=0.5``); values
                are Python literals, YAML lists or text. A key must be there already, or be an
                argument of a described call; ``+KEY=VALUE`` adds any.

        Returns:
            `cfg`.

        Raises:
            KeyError: if there is no such key; the nearest names are listed.
            ValueError: if an override is not of this form.
        """
        override(cfg, overrides)
        return cfg

    @staticmethod
    def to_py(cfg: object, prefix: str = "cfg.") -> str:
        """Return a config as readable Python: one assignment per value or described call.

        Args:
            cfg: the config.
            prefix: what each line starts with.
        """
        return to_python(cfg, prefix)
