"""Names of datasets: how to load them (`DatasetCatalog`), what is known (`MetadataCatalog`)."""

from __future__ import annotations

import logging
import os
from collections import UserDict
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np

from d2kit.utils.errors import AssertedTypeError, AssertedValueError
from d2kit.utils.registry import nearest_names

__all__ = ["DatasetCatalog", "Metadata", "MetadataCatalog"]


def dataset_root() -> str:
    """Return the folder of the public datasets.

    That is the environment variable D2KIT_DATASETS, or DETECTRON2_DATASETS, or `datasets` in the
    working folder.
    """
    names = ("D2KIT_DATASETS", "DETECTRON2_DATASETS")
    return os.path.expanduser(next(filter(None, map(os.environ.get, names)), "datasets"))


T = TypeVar("T")

logger = logging.getLogger(__name__)

GIVES_WAY = ("lvis_v1_train_cocofied", "lvis_v1_val_cocofied")
"""Public datasets that Detectron2 does not register: somebody's own of that name replaces them."""

_PENDING: dict[str, Callable[[str], None]] = {}
"""Datasets that are known but registered only when first named (see `register_on_use`)."""


def register_on_use(names: Iterable[str], register: Callable[[str], None]) -> None:
    """Make `names` known; `register(name)` runs when one of them is first asked for.

    Args:
        names: dataset names.
        register: registers the dataset of that name in both catalogs.
    """
    _PENDING.update(dict.fromkeys(names, register))


def _settle(name: object) -> None:
    """Register the pending dataset `name`, if it is one."""
    register = _PENDING.pop(name, None) if isinstance(name, str) else None
    if register is not None:
        register(str(name))


class _DatasetCatalog(UserDict[str, Callable[[], Any]]):
    """Maps the name of a dataset to a function that returns its records.

    The function takes no argument and returns a list of dictionaries in the standard format
    (`file_name`, `height`, `width`, `image_id`, `annotations`), or a `torch.utils.data.Dataset`.
    """

    def register(self, name: str, func: Callable[[], Any]) -> None:
        """Register `func` under `name`.

        Args:
            name: a new name.
            func: called without arguments by `get`; the same records in the same order every time.

        Raises:
            TypeError: `func` is not callable.
            ValueError: the name is taken.
        """
        if not callable(func):
            raise AssertedTypeError(
                f"DatasetCatalog.register('{name}', ...) expects a function without arguments, "
                f"got {type(func).__name__}"
            )
        if name in GIVES_WAY and _PENDING.pop(name, None) is not None:
            logger.info("Dataset '%s' is now the one that was just registered", name)
        if name in self:
            raise AssertedValueError(
                f"dataset '{name}' is already registered; choose another name or call "
                f"DatasetCatalog.remove('{name}') first"
            )
        self.data[name] = func

    def get(self, name: str) -> Any:  # type: ignore[override]
        """Load the dataset `name`.

        Returns:
            What the registered function returns.

        Raises:
            KeyError: there is no such dataset; the message lists the nearest names.
        """
        return self[name]()

    def list(self) -> list[str]:
        """Return the names of all datasets; none is registered by that."""
        return [*self.data, *_PENDING]

    def remove(self, name: str) -> None:
        """Forget the dataset `name`; its metadata stays."""
        self.pop(name)

    def clear(self) -> None:
        """Forget all datasets, the built-in ones included."""
        _PENDING.clear()
        self.data.clear()

    def __contains__(self, key: object) -> bool:
        _settle(key)
        return key in self.data

    def __getitem__(self, key: str) -> Callable[[], Any]:
        _settle(key)
        if key in self.data:
            return self.data[key]
        known = [*self.data, *_PENDING]
        near = nearest_names(str(key), known)
        if near:
            hint = f"nearest: {', '.join(near)}"
        else:
            hint = f"registered: {', '.join(sorted(self.data)) or 'none'}"
        raise KeyError(
            f"dataset '{key}' is not registered ({hint}). Register it before use: for COCO JSON in "
            f"the config, DATASETS.REGISTER_COCO: [[{key}, annotations.json, image/folder]], or in "
            f"Python, d2kit.register_dataset('{key}', 'annotations.json', 'image/folder'), "
            f"or DatasetCatalog.register('{key}', function)"
        )

    def __delitem__(self, key: str) -> None:
        self[key]  # the error for an unknown name
        del self.data[key]

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)


class Metadata(SimpleNamespace):
    """Facts of one dataset as attributes: `thing_classes`, `json_file`, `evaluator_type`, ...

    An attribute is set once; setting it again to an equal value does nothing, and to another value
    is an error, so that two parts of a program cannot disagree about a dataset.
    """

    name: str = "N/A"

    def __getattr__(self, key: str) -> Any:
        if key.startswith("__"):
            raise AttributeError(key)
        present = [k for k in self.__dict__ if k != "name"]
        near = nearest_names(key, present)
        hint = f"nearest: {', '.join(near)}" if near else f"it has: {', '.join(present) or 'none'}"
        raise AttributeError(
            f"metadata of dataset '{self.name}' has no attribute '{key}' ({hint}). Some attributes "
            f"exist only after the dataset was loaded by DatasetCatalog.get('{self.name}'); set "
            f"others by MetadataCatalog.get('{self.name}').set({key}=...)"
        )

    def __setattr__(self, key: str, value: Any) -> None:
        if key in self.__dict__ and not _equal(self.__dict__[key], value):
            raise AssertedValueError(
                f"metadata '{key}' of dataset '{self.name}' is already "
                f"{_short(self.__dict__[key])} and cannot become {_short(value)}; use "
                f"another dataset name, or MetadataCatalog.remove('{self.name}') first"
            )
        super().__setattr__(key, value)

    def as_dict(self) -> dict[str, Any]:
        """Return a copy of all attributes; changing it does not change the metadata."""
        return dict(self.__dict__)

    def set(self, **kwargs: Any) -> Metadata:
        """Set several attributes; returns the metadata itself."""
        for key, value in kwargs.items():
            setattr(self, key, value)
        return self

    def get(self, key: str, default: T | None = None) -> Any | T | None:
        """Return attribute `key`, or `default` where it is not set."""
        return self.__dict__.get(key, default)


def _equal(a: Any, b: Any) -> bool:
    """Compare values that may hold arrays."""
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return np.array_equal(a, b)
    return bool(a == b)


def _short(value: Any) -> str:
    """Show a value within 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class _MetadataCatalog(UserDict[str, Metadata]):
    """Maps the name of a dataset to its `Metadata`, which exists once per name."""

    def get(self, name: str) -> Metadata:  # type: ignore[override]
        """Return the metadata of `name`; an empty one is made for a new name.

        Args:
            name: name of a dataset, registered or not.

        Raises:
            ValueError: the name is empty.
        """
        if not name:
            raise AssertedValueError("MetadataCatalog.get expects the name of a dataset, got ''")
        _settle(name)
        if name not in self.data:
            self.data[name] = Metadata(name=name)
        return self.data[name]

    def list(self) -> list[str]:
        """Return the names that have metadata; those of public datasets are made when asked for."""
        return [*self.data, *(name for name in _PENDING if name not in self.data)]

    def remove(self, name: str) -> None:
        """Forget the metadata of `name`; the dataset stays."""
        self.pop(name)

    def __contains__(self, key: object) -> bool:
        _settle(key)
        return key in self.data

    def __getitem__(self, key: str) -> Metadata:
        _settle(key)
        return super().__getitem__(key)

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)


DatasetCatalog = _DatasetCatalog()
MetadataCatalog = _MetadataCatalog()
