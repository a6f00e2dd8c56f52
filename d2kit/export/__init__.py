"""Models outside of Python: tracing, for TorchScript, ONNX and torch.export."""

from d2kit.config import CfgNode
from d2kit.export.backends import ExportedModel, is_exported, load_exported, read_config
from d2kit.export.flatten import TracingAdapter, dump_torchscript_IR, flatten_to_tuple
from d2kit.export.folder import export_model

__all__ = [
    "STABLE_ONNX_OPSET_VERSION",
    "ExportedModel",
    "TracingAdapter",
    "add_export_config",
    "dump_torchscript_IR",
    "export_model",
    "flatten_to_tuple",
    "is_exported",
    "load_exported",
    "read_config",
]

STABLE_ONNX_OPSET_VERSION = 11
"""The oldest ONNX opset that has all operators of a detector."""


def add_export_config(cfg: CfgNode) -> CfgNode:
    """Add the keys of the former Caffe2 export, so that configs that hold them can be read."""
    frozen = cfg.is_frozen()
    cfg.defrost()
    cfg.EXPORT_CAFFE2 = CfgNode({"USE_HEATMAP_MAX_KEYPOINT": False})
    if frozen:
        cfg.freeze()
    return cfg
