"""Name -> object registries whose errors list the nearest names."""

import difflib
import importlib
from collections.abc import Iterable
from typing import Any

from fvcore.common.registry import Registry as _FvcoreRegistry

__all__ = ["Registry", "locate", "nearest_names"]


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


class Registry(_FvcoreRegistry):
    """A named mapping from strings to classes or functions, filled by `register`.

    Args:
        name: the registry's name, used in messages (for example ``"BACKBONE"``).
    """

    def _do_register(self, name: str, obj: Any) -> None:
        if name in self._obj_map:
            raise ValueError(
                f"'{name}' is already registered in the {self._name} registry as "
                f"{self._obj_map[name]!r}; give the new object another name"
            )
        self._obj_map[name] = obj

    def get(self, name: str) -> Any:
        """Return the object registered under `name`.

        Raises:
            KeyError: if there is none; the message lists the nearest names.
        """
        if name in self._obj_map:
            return self._obj_map[name]
        near = nearest_names(str(name), self._obj_map)
        listed = f"nearest: {', '.join(near)}" if near else f"known: {sorted(self._obj_map)}"
        raise KeyError(
            f"no object named '{name}' in the {self._name} registry ({listed}); "
            "is the module that registers it imported?"
        )


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
