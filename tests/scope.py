"""Which of Detectron2's public names are not there yet, or not meant to be, and why."""

_LATER_MODULES: dict[str, str] = {}
_LATER_NAMES: dict[str, str] = {}
LATER_MODULES = {f"d2kit.{m}": why for why, text in _LATER_MODULES.items() for m in text.split()}
"""Module -> the later piece of work that it belongs to."""
LATER_NAMES = {name: why for why, text in _LATER_NAMES.items() for name in text.split()}
"""Name, in whatever module -> the later piece of work that it belongs to."""

_CAFFE2 = "Caffe2 is not maintained any more: trace through d2kit.export.TracingAdapter"
_SCRIPT = "torch has deprecated torch.jit.script: trace through d2kit.export.TracingAdapter"
NEVER = {
    **dict.fromkeys(("Caffe2Tracer", "shared", "caffe2_modeling"), _CAFFE2),
    **dict.fromkeys(("scripting_with_instances", "torchscript_patch"), _SCRIPT),
    "detect_compute_compatibility": "d2kit has no compiled extension",
    "test_nccl_ops": "torch.distributed has its own tests of NCCL",
}
"""Name -> why it is left out for good."""


def out_of_scope(path: str) -> str:
    """Return why a public path need not resolve, or an empty string."""
    for module, why in LATER_MODULES.items():
        if path == module or path.startswith(f"{module}."):
            return why
    names = {**LATER_NAMES, **NEVER}
    return next((names[part] for part in path.split(".") if part in names), "")
