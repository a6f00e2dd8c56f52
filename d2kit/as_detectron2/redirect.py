"""Import hook: ``detectron2.X`` is the module ``d2kit.X`` itself."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

ORIGINAL = "detectron2"
API_VERSION = "0.6"  # what code that asks for detectron2.__version__ was written for
CHOICE = "D2KIT_AS_DETECTRON2"

MOVED = {
    "modeling.roi_heads.fast_rcnn.FastRCNNOutputs": "modeling.roi_heads.fast_rcnn_outputs",
    "modeling.roi_heads.FastRCNNOutputs": "modeling.roi_heads.fast_rcnn_outputs",
}
"""Names that lie elsewhere here -> the module that has them."""

ABSENT = {
    "_C": "d2kit has no compiled extension: its ops are torch's and torchvision's "
    "(d2kit.layers has all of Detectron2's)",
    "export.caffe2_modeling": "Caffe2 is not maintained any more; export with torch.onnx or "
    "torch.export through d2kit.export.TracingAdapter",
    "export.shared": "it belongs to Caffe2, which is not maintained any more",
    "export.api": "it belongs to Caffe2, which is not maintained any more",
    "export.torchscript_patch": "it patches classes for torch.jit.script, which torch has "
    "deprecated; trace through d2kit.export.TracingAdapter",
    "export.c10": "it belongs to Caffe2, which is not maintained any more",
}
"""Module below the package -> why there is none."""


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
        """Return a spec that loads d2kit's module; None for other packages.

        Raises:
            ImportError: for modules that d2kit leaves out, with the reason.
        """
        if not fullname.startswith(f"{ORIGINAL}."):
            return None
        tail = fullname[len(ORIGINAL) + 1 :]
        if tail in ABSENT:
            raise ImportError(f"{fullname} does not exist under d2kit: {ABSENT[tail]}")
        real = importlib.util.find_spec(f"d2kit.{tail}")
        if real is None:
            return None
        is_package = real.submodule_search_locations is not None
        return importlib.machinery.ModuleSpec(
            fullname, _Alias(f"d2kit.{tail}"), origin=real.origin, is_package=is_package
        )


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
    return True
