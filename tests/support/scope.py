"""Which of Detectron2's public names are not meant to be there, and why."""

_CAFFE2 = "Caffe2 is not maintained any more: trace through d2kit.export.TracingAdapter"
_SCRIPT = "torch has deprecated torch.jit.script: trace through d2kit.export.TracingAdapter"
_MMDET = "MMDetection's models run in MMDetection; its weights load here (docs/weights.md)"
NEVER = {
    **dict.fromkeys(("Caffe2Tracer", "shared", "caffe2_modeling"), _CAFFE2),
    **dict.fromkeys(("scripting_with_instances", "torchscript_patch"), _SCRIPT),
    "detect_compute_compatibility": "d2kit has no compiled extension",
    **dict.fromkeys(("MMDetBackbone", "MMDetDetector"), _MMDET),
    "test_nccl_ops": "torch.distributed has its own tests of NCCL",
}
"""Name -> why it is left out for good."""


def out_of_scope(path: str) -> str:
    """Return why a public path need not resolve, or an empty string."""
    return next((NEVER[part] for part in path.split(".") if part in NEVER), "")
