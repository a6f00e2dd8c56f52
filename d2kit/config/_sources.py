"""Configs to look at: read from files, run folders and checkpoints, with the place of each value.

Nothing is executed: a Python config is refused.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2kit.config._cfg_node import CfgNode
from d2kit.config._keys import KEYS
from d2kit.config._versions import upgrade_values
from d2kit.config._yaml import load_yaml, parse_yaml
from d2kit.config._zoo_folder import find_zoo_file, nearest_zoo_names, zoo_names
from d2kit.config.defaults import _C
from d2kit.utils.nested import flatten

__all__ = ["COMMAND_LINE", "Source", "read_source"]

COMMAND_LINE = "the command line"
WEIGHTS = (".pth", ".pt", ".pkl", ".safetensors")


@dataclass(frozen=True)
class Source:
    """A config that was read.

    Args:
        title: what was read, for people.
        values: full key -> value; of a config of Detectron2's kind all keys, of a lazy one those
            that are written there.
        origins: full key -> "file:line" or `COMMAND_LINE`, of the keys that something set.
        cfg: the config; None for a lazy one.
    """

    title: str
    values: dict[str, Any]
    origins: dict[str, str]
    cfg: CfgNode | None


def _find(name: str) -> Path:
    """Return the file that a config's name means.

    Raises:
        FileNotFoundError: if there is none; the nearest names are listed.
        ValueError: if it is a Python program.
    """
    path = Path(name)
    if path.is_dir():
        if not (path / "config.yaml").is_file():
            raise FileNotFoundError(
                f"'{name}' is a folder without config.yaml: expected the folder of a run, or name "
                "a file in it"
            )
        path = path / "config.yaml"
    elif not path.exists():
        found = find_zoo_file(name)
        if found is None and path.parent.is_dir() and path.parent != Path():
            return path  # whose reader lists the nearest files there
        if found is None:
            raise FileNotFoundError(
                f"'{name}' is neither a file, the folder of a run, nor a name of the model zoo "
                f"({nearest_zoo_names(name, zoo_names())})"
            )
        path = found
    if path.suffix == ".py":
        raise ValueError(
            f"'{path}' is a Python config: a program, which is not executed here. Give the "
            'config.yaml of a run that was trained with it, or, if you trust it: python -c "from '
            f"d2kit.config import LazyConfig as L; print(L.to_py(L.load('{path}', trust=True)))\""
        )
    return path


def _shown(place: str) -> str:
    """Return a place "file:line" relative to the working folder, where it lies below."""
    file, _, line = place.rpartition(":")
    path = os.path.relpath(file) if os.path.isabs(file) else file
    return f"{file if path.startswith('..') else path}:{line}"


def _is_lazy(values: Mapping[str, Any]) -> bool:
    """Tell whether a YAML file is a lazy config: described calls, or none of our sections."""
    sections = {key.partition(".")[0] for key in KEYS}
    described = any(key.rpartition(".")[2] == "_target_" for key in flatten(values))
    return described or (bool(values) and not sections & set(values))


def read_source(
    name: str,
    overrides: Sequence[str] = (),
    *,
    any_key: bool = False,
    recorded: Callable[[Path], str] | None = None,
) -> Source:
    """Read a config and where its values come from; nothing is executed.

    Args:
        name: a YAML file, the folder of a run, a name of the model zoo, or a checkpoint.
        overrides: ``KEY VALUE`` pairs of a command line.
        any_key: keep keys that do not exist here (of another version or project); otherwise they
            are an error.
        recorded: checkpoint -> YAML of the config that it was trained with; None: checkpoints are
            refused.

    Raises:
        FileNotFoundError: if there is no such config; the nearest names are listed.
        KeyError: if a key does not exist; the nearest ones are listed.
        ValueError: for a Python config, a malformed file or a value of a wrong type.
    """
    path = _find(name)
    if path.suffix in WEIGHTS:
        if recorded is None:
            raise ValueError(
                f"'{path}' is a checkpoint, which tools/config.py reads; here, give the folder of "
                "its run"
            )
        values, origins = parse_yaml(recorded(path), path)
        origins = dict.fromkeys(origins, f"the config in {path}")
    else:
        values, origins = load_yaml(str(path))
        origins = {key: _shown(place) for key, place in origins.items()}
    if _is_lazy(values):
        if overrides:
            raise ValueError(f"'{path}' is a lazy config: KEY VALUE pairs are for the other kind")
        found = flatten(values)
        return Source(name, found, {k: v for k, v in origins.items() if k in found}, None)
    values = upgrade_values(values, str(path), origins)
    node = _C.clone()
    node.set_new_allowed(any_key)
    node._merge(values, str(path), origins)
    node.set_new_allowed(False)
    node.merge_from_list(overrides)
    origins |= dict.fromkeys(overrides[::2], COMMAND_LINE)
    found = flatten(node)
    return Source(name, found, {k: v for k, v in origins.items() if k in found}, node)
