"""Import hook: ``detectron2.X`` is the module ``d2kit.X`` itself."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import pathlib
import pkgutil
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

from d2kit.as_detectron2._absent import ABSENT, ABSENT_NAMES, AbsentModule, absent_class
from d2kit.as_detectron2._loggers import serve_loggers

ORIGINAL = "detectron2"
API_VERSION = "0.6"  # what code that asks for detectron2.__version__ was written for
CHOICE = "D2KIT_AS_DETECTRON2"

MOVED = {
    "modeling.roi_heads.fast_rcnn.FastRCNNOutputs": "modeling.roi_heads.fast_rcnn_outputs",
    "modeling.roi_heads.FastRCNNOutputs": "modeling.roi_heads.fast_rcnn_outputs",
}
"""Names that lie elsewhere here -> the module that has them."""


class _Alias(importlib.abc.Loader):
    """Puts a module of d2kit under the original's name."""

    def __init__(self, real: str) -> None:
        self.real = real

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        """Leave it to Python: the module made is replaced in `exec_module`."""

    def exec_module(self, module: ModuleType) -> None:
        """Import the real module; put it where this one is expected, with the names that moved."""
        real = sys.modules[module.__name__] = importlib.import_module(self.real)
        for path, home in MOVED.items():
            place, _, name = path.rpartition(".")
            if self.real == f"d2kit.{place}":
                setattr(real, name, getattr(importlib.import_module(f"d2kit.{home}"), name))
        for path, reason in ABSENT_NAMES.items():
            place, _, name = path.rpartition(".")
            if self.real == f"d2kit.{place}" and not hasattr(real, name):
                setattr(real, name, absent_class(f"{ORIGINAL}.{path}", reason))
        _keep_names(module.__name__, real)


def _keep_names(alias: str, package: ModuleType) -> None:
    """Put submodules that are named like an object of `package` in place, under the alias's name.

    Importing ``detectron2.layers.nms`` later would bind the module over the function
    ``layers.nms``: Python binds every module that it loads in its package. One that is in
    `sys.modules` is not loaded again.
    """
    for info in pkgutil.iter_modules(getattr(package, "__path__", ())):
        kept = getattr(package, info.name, None)
        if info.name.startswith("_") or kept is None or isinstance(kept, ModuleType):
            continue
        submodule = importlib.import_module(f"{package.__name__}.{info.name}")
        setattr(package, info.name, kept)
        sys.modules[f"{alias}.{info.name}"] = submodule


class _Absent(importlib.abc.Loader):
    """Loads a module that d2kit does not have as names that raise when they are called."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """Make the module."""
        return AbsentModule(spec.name, self.reason)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is executed."""


class _Distribution(importlib.metadata.Distribution):
    """What ``importlib.metadata`` finds under the original's name."""

    def read_text(self, filename: str) -> str | None:
        """Return the metadata; None for other files."""
        if filename == "METADATA":
            return f"Metadata-Version: 2.1\nName: {ORIGINAL}\nVersion: {API_VERSION}\n"
        return None

    def locate_file(self, path: str | os.PathLike[str]) -> Any:
        """Return the place of a file, in d2kit."""
        import d2kit

        return pathlib.Path(d2kit.__file__).parent / path


class _Root(ModuleType):
    """The package ``detectron2`` itself: d2kit with the version of the API."""

    __version__ = API_VERSION
    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        import d2kit

        return getattr(d2kit, name)


class Redirect(importlib.abc.MetaPathFinder):
    """Finds ``detectron2.X`` in d2kit."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        """Return a spec that loads d2kit's module; None for other packages."""
        if not fullname.startswith(f"{ORIGINAL}."):
            return None
        tail = fullname[len(ORIGINAL) + 1 :]
        if tail in ABSENT:
            return importlib.machinery.ModuleSpec(fullname, _Absent(ABSENT[tail]))
        try:
            real = importlib.util.find_spec(f"d2kit.{tail}")
        except ModuleNotFoundError:
            return None  # below a module that is none
        if real is None:
            return None
        is_package = real.submodule_search_locations is not None
        return importlib.machinery.ModuleSpec(
            fullname, _Alias(f"d2kit.{tail}"), origin=real.origin, is_package=is_package
        )

    def find_distributions(
        self,
        context: Any = importlib.metadata.DistributionFinder.Context(),  # noqa: B008 as its base
    ) -> Iterator[importlib.metadata.Distribution]:
        """Answer for the distribution ``detectron2``, as `importlib.metadata` asks."""
        if context.name is not None and context.name.lower() == ORIGINAL:
            yield _Distribution()


def install(choice: str | None = None) -> bool:
    """Serve every later ``import detectron2...`` from d2kit.

    Args:
        choice: ``d2kit``: even where the original is installed; ``original``: do nothing; None: the
            environment variable ``D2KIT_AS_DETECTRON2``, else d2kit where the original is absent.

    Returns:
        True where d2kit serves now.

    Raises:
        ValueError: for another choice.
        ImportError: where the original is installed or already imported, and nothing was chosen; or
            d2kit was chosen after modules of the original had been imported.
    """
    choice = choice if choice is not None else os.environ.get(CHOICE, "")
    if choice not in ("", "d2kit", "original"):
        raise ValueError(f"{CHOICE}: expected 'd2kit' or 'original', got '{choice}'")
    if choice == "original":
        return False
    if isinstance(sys.modules.get(ORIGINAL), _Root):
        return True
    if ORIGINAL in sys.modules:
        raise ImportError(
            "the original detectron2 is imported already; import d2kit.as_detectron2 before it, or "
            "start the script with python -m d2kit.as_detectron2 SCRIPT"
        )
    if choice == "" and (found := importlib.util.find_spec(ORIGINAL)) is not None:
        raise ImportError(
            f"the original detectron2 is installed ({found.origin}); set {CHOICE}=d2kit to use "
            f"d2kit in its place, or {CHOICE}=original to leave it in use"
        )
    root = _Root(ORIGINAL)
    root.__spec__ = importlib.machinery.ModuleSpec(ORIGINAL, None, is_package=True)
    sys.modules[ORIGINAL] = root
    sys.meta_path.insert(0, Redirect())
    serve_loggers(ORIGINAL, "d2kit")
    return True
