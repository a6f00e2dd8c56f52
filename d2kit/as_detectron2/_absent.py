"""What Detectron2 has and d2kit does not: names that resolve, and raise when they are called."""

from __future__ import annotations

from types import ModuleType
from typing import Any

_CAFFE2 = (
    "it belongs to Caffe2, which is not maintained any more; export with torch.onnx or "
    "torch.export through d2kit.export.TracingAdapter"
)
_SCRIPT = (
    "it serves torch.jit.script, which torch has deprecated; trace through "
    "d2kit.export.TracingAdapter"
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
}
"""Name below the package, in a module that exists -> why there is none."""


class NotHere:
    """Base of the placeholders: a class of Detectron2 that d2kit leaves out.

    It can be imported, subclassed and passed on; making an object of it, or calling it, raises
    `NotImplementedError` with what to use instead.
    """

    path = ""
    reason = ""

    def __new__(cls, *_: Any, **__: Any) -> NotHere:
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

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = absent_class(f"{self.__name__}.{name}", self._reason)
        setattr(self, name, found)
        return found
