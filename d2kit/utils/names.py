"""Names: the nearest ones, dotted paths, keys of nested configs, errors of wrong ones."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = [
    "AssertedFileError",
    "AssertedKeyError",
    "AssertedTypeError",
    "AssertedValueError",
    "NoStorageError",
    "NoWeightsError",
    "ZooError",
    "flatten",
    "locate",
    "nearest_names",
    "overrides",
]


def nearest_names(name: str, candidates: Iterable[str], n: int = 3) -> list[str]:
    """Return the `n` candidates that look most like `name`, best first.

    A dotted candidate is compared as a whole and by its last part, so that both a misspelt key and
    a right key in the wrong section find their target.

    Args:
        name: what the user wrote.
        candidates: the names that exist, dotted or not.
        n: the largest number of names to return.

    Returns:
        Up to `n` names; empty where nothing is similar.
    """
    wanted = name.casefold()
    last = wanted.rpartition(".")[2]

    def likeness(candidate: str) -> float:
        other = candidate.casefold()
        whole = difflib.SequenceMatcher(None, wanted, other).ratio()
        if "." not in candidate:
            return whole
        part = difflib.SequenceMatcher(None, last, other.rpartition(".")[2]).ratio()
        return max(whole, part) * 0.75 + min(whole, part) * 0.25

    scored = sorted(((likeness(c), c) for c in dict.fromkeys(candidates)), key=lambda s: -s[0])
    return [candidate for score, candidate in scored[:n] if score >= 0.6]


def locate(name: str) -> Any:
    """Return the module, class or function with the dotted path `name`, importing what is needed.

    Args:
        name: for example ``"torch.nn.Conv2d"`` or ``"package.module.Class.method"``.

    Raises:
        ImportError: if no such object exists; a failure inside an existing module is passed on.
    """
    parts = name.split(".")
    if not all(part.isidentifier() for part in parts):
        raise ImportError(f"'{name}' is not a dotted Python path such as 'package.module.Class'")
    for end in range(len(parts), 0, -1):
        module_name = ".".join(parts[:end])
        try:
            found: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
                continue
            raise
        for part in parts[end:]:
            if not hasattr(found, part):
                near = nearest_names(part, dir(found))
                raise ImportError(f"cannot locate '{name}': '{part}' not found, nearest: {near}")
            found = getattr(found, part)
        return found
    raise ImportError(f"cannot locate '{name}': there is no module '{parts[0]}'")


class AssertedValueError(ValueError, AssertionError):
    """A value that Detectron2 refuses by an assertion."""


class AssertedTypeError(TypeError, AssertionError):
    """A type that Detectron2 refuses by an assertion."""


class AssertedKeyError(KeyError, AssertionError):
    """A name that Detectron2 looks for by an assertion."""


class AssertedFileError(FileNotFoundError, AssertionError):
    """A file that Detectron2 looks for by an assertion."""


class NoStorageError(RuntimeError, AssertionError):
    """There is no `EventStorage` around the call."""


class ZooError(FileNotFoundError, RuntimeError):
    """A config or checkpoint that the model zoo does not have."""


class NoWeightsError(ValueError, RuntimeError):
    """There are no published weights for a config of the model zoo."""


def flatten(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return full key, ``A.B.C``, -> value of what is no mapping itself.

    Args:
        node: keys are text.
        prefix: put before each key.
    """
    found: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, Mapping):
            found |= flatten(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def overrides(obj: object, base: type, *names: str) -> bool:
    """Tell whether the class of `obj` has its own version of one of the methods.

    Asked once, when the object is made: a path that works on all images and levels at once is
    taken only where no subclass has replaced one of the steps that it joins.

    Args:
        obj: an object of `base` or a subclass.
        base: the class whose path it is.
        names: methods of `base`.
    """
    return any(getattr(type(obj), name) is not getattr(base, name) for name in names)
