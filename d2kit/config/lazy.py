"""Lazy configs: configs that are Python code, whose calls are made when `instantiate` says so.

They need the package omegaconf: ``pip install 'd2kit[lazy]'``.
"""

import dataclasses
import inspect
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2kit.config._lazy_files import check_trusted, run_config_file
from d2kit.config._lazy_text import override, to_python, to_yaml
from d2kit.config._omegaconf import as_config, require_omegaconf, sequence_type
from d2kit.config._targets import remember_target
from d2kit.config._yaml import load_yaml
from d2kit.utils.file_io import atomic_write
from d2kit.utils.registry import nearest_names

if TYPE_CHECKING:
    from collections.abc import Callable

    from omegaconf import DictConfig

__all__ = ["LazyCall", "LazyConfig"]

TARGET = "_target_"
YAML = (".yaml", ".yml")
CONTAINERS = (dict, list, tuple, set)


class LazyCall:
    """Describes a call instead of making it: ``LazyCall(torch.nn.Conv2d)(in_channels=3, ...)``.

    Args:
        target: a function or class, or the dotted name of one in an allowed package.

    Raises:
        TypeError: if it is neither callable nor text.
    """

    def __init__(self, target: "Callable[..., Any] | str") -> None:
        if not callable(target) and not isinstance(target, str):
            raise TypeError(f"LazyCall expects a callable or the name of one, got {target!r}")
        self._target = target

    def __call__(self, **kwargs: Any) -> "DictConfig":
        """Return the described call, to be changed like any config and made by `instantiate`.

        Args:
            kwargs: the arguments of the call; other described calls may be among them.
        """
        target = self._target
        if target in CONTAINERS or dataclasses.is_dataclass(target):
            target = remember_target(target)  # omegaconf would take the class for a schema
        return as_config({TARGET: target, **kwargs})


def _is_public_config(name: str, value: Any) -> bool:
    """Tell whether a variable of a Python config belongs to it: its containers, no helpers."""
    holds = isinstance(value, Mapping) or sequence_type(value) is not None
    return holds and not name.startswith("_")


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
    def load_rel(filename: str, keys: str | tuple[str, ...] | None = None) -> Any:
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
        return LazyConfig.load(str(Path(caller).parent / filename), keys, trust=True)

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
            return _select(load_yaml(file).values, keys, filename)
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
    def save(cfg: Any, filename: str) -> None:
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
    def apply_overrides(cfg: "DictConfig", overrides: list[str]) -> "DictConfig":
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
    def to_py(cfg: Any, prefix: str = "cfg.") -> str:
        """Return a config as readable Python: one assignment per value or described call.

        Args:
            cfg: the config.
            prefix: what each line starts with.
        """
        return to_python(cfg, prefix)
