"""Import hook: ``detectron2.X`` is the module ``d2kit.X`` itself.

With it come the names that d2kit leaves out, which resolve and raise when they are called, and the
loggers, which have one level, one terminal and one file under both names.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import logging
import os
import pathlib
import pkgutil
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import d2kit
from d2kit import RENAMED

ORIGINAL = "detectron2"
API_VERSION = "0.6"  # what code that asks for detectron2.__version__ was written for
CHOICE = "D2KIT_AS_DETECTRON2"

MOVED = {
    "modeling.roi_heads.fast_rcnn.FastRCNNOutputs": "modeling.roi_heads.fast_rcnn_outputs",
    "modeling.roi_heads.FastRCNNOutputs": "modeling.roi_heads.fast_rcnn_outputs",
}
"""Names that lie elsewhere here -> the module that has them."""


def real_name(path: str) -> str:
    """Return the name in d2kit of a module or object, given by its path below the package."""
    first, *rest = path.split(".")
    return ".".join(["d2kit", RENAMED.get(first, first), *rest])


# ---------------------------------------------------------------- what is left out


_CAFFE2 = (
    "it belongs to Caffe2, which is not maintained any more; export with torch.onnx or "
    "torch.export through d2kit.export.TracingAdapter"
)
_SCRIPT = (
    "it serves torch.jit.script, which torch has deprecated; trace through "
    "d2kit.export.TracingAdapter"
)

_MMDET = (
    "MMDetection needs mmcv, which has no wheels for today's torch; load its weights into a model "
    "of d2kit (docs/weights.md), or run MMDetection itself"
)

ABSENT = {
    "_C": "d2kit has no compiled extension: its ops are torch's and torchvision's "
    "(d2kit.layers has all of Detectron2's)",
    "export.caffe2_modeling": _CAFFE2,
    "export.caffe2_export": _CAFFE2,
    "export.caffe2_inference": _CAFFE2,
    "export.caffe2_patch": _CAFFE2,
    "export.shared": _CAFFE2,
    "export.api": _CAFFE2,
    "export.c10": _CAFFE2,
    "export.torchscript_patch": _SCRIPT,
    "modeling.mmdet_wrapper": _MMDET,
}
"""Module below the package -> why there is none."""

ABSENT_NAMES = {
    "export.scripting_with_instances": _SCRIPT,
    "export.torchscript.scripting_with_instances": _SCRIPT,
    "utils.collect_env.detect_compute_compatibility": "it reads the architectures of a compiled "
    "extension, and d2kit has none; d2kit.utils.collect_env.collect_env_info() tells about the GPU",
    "utils.collect_env.test_nccl_ops": "torch.distributed tests NCCL at its first collective",
    "export.Caffe2Tracer": _CAFFE2,
    "export.Caffe2Model": _CAFFE2,
    "export.export_caffe2_model": _CAFFE2,
    "modeling.MMDetBackbone": _MMDET,
    "modeling.MMDetDetector": _MMDET,
}
"""Name below the package, in a module that exists -> why there is none."""


class NotHere:
    """Base of the placeholders: a class of Detectron2 that d2kit leaves out.

    It can be imported, subclassed and passed on; making an object of it, or calling it, raises
    `NotImplementedError` with what to use instead.
    """

    path = ""
    reason = ""

    def __new__(cls, *_: object, **__: object) -> NotHere:
        """Refuse."""
        raise NotImplementedError(f"{cls.path} does not exist under d2kit: {cls.reason}")


def absent_class(path: str, reason: str) -> type[NotHere]:
    """Return a placeholder.

    Args:
        path: dotted name in Detectron2.
        reason: why there is none, and what to use instead.
    """
    name = path.rpartition(".")[2]
    return type(name, (NotHere,), {"path": path, "reason": reason, "__module__": __name__})


class AbsentModule(ModuleType):
    """A module that d2kit leaves out: every public name of it is a placeholder.

    Args:
        name: full dotted name.
        reason: why there is none, and what to use instead.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, f"{name} does not exist under d2kit: {reason}")
        self._reason = reason

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        found = absent_class(f"{self.__name__}.{name}", self._reason)
        setattr(self, name, found)
        return found


# ---------------------------------------------------------------- loggers


class _OneName(dict[str, Any]):
    """The table of loggers, in which ``original.X`` is ``real.X``."""

    def __init__(self, table: dict[str, Any], original: str, real: str) -> None:
        super().__init__(table)
        self._original, self._real = original, real

    def _known(self, name: object) -> object:
        if isinstance(name, str) and name.partition(".")[0] == self._original:
            return self._real + name[len(self._original) :]
        return name

    def __contains__(self, name: object) -> bool:
        return super().__contains__(self._known(name))

    def __getitem__(self, name: str) -> object:
        return super().__getitem__(str(self._known(name)))

    def __setitem__(self, name: str, value: object) -> None:
        super().__setitem__(str(self._known(name)), value)

    def get(self, name: str, default: object = None) -> object:
        return super().get(str(self._known(name)), default)


def serve_loggers(original: str, real: str) -> None:
    """Let ``logging.getLogger("original.X")`` be ``logging.getLogger("real.X")``.

    A logger that somebody made under the original's name before stays theirs, and hands its records
    to ours.

    Args:
        original: name of the package whose loggers are asked for.
        real: name of the package that logs.
    """
    manager = logging.Logger.manager
    if isinstance(manager.loggerDict, _OneName):
        return
    ours = logging.getLogger(real)
    for name, logger in list(manager.loggerDict.items()):
        if name.partition(".")[0] != original or not isinstance(logger, logging.Logger):
            continue
        logger.parent = ours
        if name == original and logger.level != logging.NOTSET:
            ours.setLevel(logger.level)
    manager.loggerDict = _OneName(manager.loggerDict, original, real)


# ---------------------------------------------------------------- the import hook


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
        for path, home in d2kit.MOVED.items():
            place, _, name = path.rpartition(".")
            if self.real == f"d2kit.{place}" and f"d2kit.{home}" in sys.modules:
                importlib.import_module(f"d2kit.{path}")  # Python binds it in its package
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
    own = package.__name__.partition(".")[2]
    moved = [path.rpartition(".") for path in d2kit.MOVED]
    names = [info.name for info in pkgutil.iter_modules(getattr(package, "__path__", ()))]
    for name in names + [name for place, _, name in moved if place == own]:
        kept = getattr(package, name, None)
        if name.startswith("_") or kept is None or isinstance(kept, ModuleType):
            continue
        submodule = importlib.import_module(f"{package.__name__}.{name}")
        setattr(package, name, kept)
        sys.modules[f"{alias}.{name}"] = submodule


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
        return pathlib.Path(d2kit.__file__).parent / path


class _Root(ModuleType):
    """The package ``detectron2`` itself: d2kit with the version of the API."""

    __version__ = API_VERSION
    __path__: list[str] = []

    def __getattr__(self, name: str) -> object:
        return getattr(d2kit, RENAMED.get(name, name))


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
            real = importlib.util.find_spec(real_name(tail))
        except ModuleNotFoundError:
            return None  # below a module that is none
        if real is None:
            return None
        is_package = real.submodule_search_locations is not None
        return importlib.machinery.ModuleSpec(
            fullname, _Alias(real.name), origin=real.origin, is_package=is_package
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
