"""Execution of Python config files: of those that are trusted, and of no other.

This is the one place in d2kit that runs code out of a file that a path names.
"""

import builtins
import importlib.abc
import importlib.util
import itertools
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from d2kit.config._omegaconf import as_config
from d2kit.config._zoo_folder import zoo_folder
from d2kit.utils.registry import nearest_names

__all__ = ["check_trusted", "run_config_file", "trust_configs"]

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


def _importer(file: Path, chain: tuple[Path, ...]) -> Any:
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
