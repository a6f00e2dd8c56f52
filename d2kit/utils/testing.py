"""Helpers and assertions for tests of models."""

from __future__ import annotations

import io
import os
import tempfile
import unittest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from d2kit.utils.env import min_torch_version

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = [
    "assert_instances_allclose",
    "convert_scripted_instances",
    "get_model_no_weights",
    "get_sample_coco_image",
    "has_dynamic_axes",
    "min_torch_version",
    "random_boxes",
    "register_custom_op_onnx_export",
    "reload_lazy_config",
    "reload_script_model",
    "skipIfOnCPUCI",
    "skipIfUnsupportedMinOpsetVersion",
    "skipIfUnsupportedMinTorchVersion",
    "unregister_custom_op_onnx_export",
]


def get_model_no_weights(config_path: str) -> torch.nn.Module:
    """Build a model of the zoo with random weights, on the GPU where there is one.

    Args:
        config_path: name in the zoo, ``COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml``.
    """
    from d2kit import model_zoo
    from d2kit.modeling import build_model

    cfg: Any = model_zoo.get_config(config_path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cfg.merge_from_list(["MODEL.WEIGHTS", "", "MODEL.DEVICE", device])
    return build_model(cfg)


def random_boxes(
    num_boxes: int, max_coord: float = 100, device: torch.device | str = "cpu"
) -> Tensor:
    """Return random boxes (R, 4) XYXY, of sides of at least a pixel.

    Args:
        num_boxes: R.
        max_coord: the largest coordinate of a top left corner; widths reach as far again.
        device: where to put them.
    """
    boxes = torch.rand(num_boxes, 4, device=device) * max_coord
    boxes[:, 2:] = boxes[:, :2] + boxes[:, 2:].clamp(min=1.0)
    return boxes


def get_sample_coco_image(tensor: bool = True) -> torch.Tensor | np.ndarray:
    """Return a picture in BGR, of the size of COCO's: the first of val2017 where COCO is there.

    Where it is not, nothing is downloaded: it is a made picture, the same every time.

    Args:
        tensor: as a float tensor (3, H, W); else as uint8 array (H, W, 3).
    """
    from d2kit.data.datasets import builtin
    from d2kit.data.detection_utils import read_image

    folder = Path(builtin.dataset_root()) / "coco" / "val2017"
    file = min(folder.glob("*.jpg"), default=None) if folder.is_dir() else None
    if file is not None:
        image = np.array(read_image(str(file), format="BGR"))
    else:
        coarse = np.random.default_rng(0).integers(0, 256, (15, 20, 3), dtype=np.uint8)
        image = np.kron(coarse, np.ones((32, 32, 1), dtype=np.uint8))
    return torch.from_numpy(image.astype("float32").transpose(2, 0, 1)) if tensor else image


def convert_scripted_instances(instances: Any) -> Any:
    """Return an `Instances` with the fields of an object that has them as attributes.

    Args:
        instances: with `image_size` and fields; an `Instances` is copied.
    """
    from d2kit.structures import Instances

    fields = instances.get_fields() if hasattr(instances, "get_fields") else vars(instances)
    made = Instances(instances.image_size)
    for name, value in fields.items():
        key = name.lstrip("_")
        if key != "image_size" and value is not None:
            made.set(key, value)
    return made


def reload_lazy_config(cfg: object) -> object:
    """Save a lazy config to a file and load it again.

    Args:
        cfg: a lazy config.
    """
    from d2kit.config import LazyConfig

    with tempfile.TemporaryDirectory(prefix="d2kit") as folder:
        file = str(Path(folder) / "config.yaml")
        LazyConfig.save(cfg, file)
        return LazyConfig.load(file)


def reload_script_model(module: object) -> object:
    """Save a traced or scripted module to memory and load it again."""
    buffer = io.BytesIO()
    torch.jit.save(module, buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


def has_dynamic_axes(onnx_model: ModelProto) -> bool:
    """Tell whether every input and output of an ONNX model has a dimension without a number.

    Args:
        onnx_model: an ``onnx.ModelProto``.
    """
    values = [*onnx_model.graph.input, *onnx_model.graph.output]
    return all(any(dim.dim_param for dim in value.type.tensor_type.shape.dim) for value in values)


def register_custom_op_onnx_export(
    opname: str, symbolic_fn: Any, opset_version: int, min_version: str
) -> None:
    """Register how an operator is exported to ONNX, where torch is older than a version.

    Args:
        opname: ``"aten::to"`` for example.
        symbolic_fn: see ``torch.onnx.register_custom_op_symbolic``.
        opset_version: opset that it is for.
        min_version: of torch, from which nothing is done: it exports the operator by itself.
    """
    if not min_torch_version(min_version):
        torch.onnx.register_custom_op_symbolic(opname, symbolic_fn, opset_version)


def unregister_custom_op_onnx_export(opname: str, opset_version: int, min_version: str) -> None:
    """Undo `register_custom_op_onnx_export`."""
    if not min_torch_version(min_version):
        torch.onnx.unregister_custom_op_symbolic(opname, opset_version)


def skipIfOnCPUCI(test_item: Any) -> Any:  # noqa: N802 its name
    """Skip a test on machines of continuous integration that have no GPU."""
    on_ci = bool(os.environ.get("CI")) and not torch.cuda.is_available()
    return unittest.skipIf(on_ci, "too slow without a GPU")(test_item)


def skipIfUnsupportedMinOpsetVersion(  # noqa: N802 its name
    min_opset_version: int, current_opset_version: int | None = None
) -> Any:
    """Return a decorator that skips a test below an opset of ONNX.

    Args:
        min_opset_version: the least one.
        current_opset_version: default: ours.
    """
    from d2kit.export import STABLE_ONNX_OPSET_VERSION

    current = current_opset_version or STABLE_ONNX_OPSET_VERSION
    return unittest.skipIf(current < min_opset_version, f"needs opset {min_opset_version}")


def skipIfUnsupportedMinTorchVersion(min_version: str) -> Any:  # noqa: N802 its name
    """Return a decorator that skips a test below a version of torch."""
    return unittest.skipIf(not min_torch_version(min_version), f"needs torch {min_version}")


def assert_instances_allclose(
    input: Any,  # noqa: A002 the documented name
    other: Any,
    *,
    rtol: float = 1e-5,
    msg: str = "",
    size_as_tensor: bool = False,
) -> None:
    """Raise AssertionError unless two `Instances` agree in size, fields and nearly in values.

    Tensors and box-like fields (with a ``tensor``) are compared relative to their largest absolute
    value, others with ``==``.

    Args:
        input: an `Instances`.
        other: what it should be.
        rtol: allowed difference over the field's largest absolute value.
        msg: put before the message.
        size_as_tensor: the image sizes are tensors.
    """
    prefix = f"{msg} " if msg else ""
    sizes = input.image_size, other.image_size
    if size_as_tensor:
        same = torch.equal(torch.as_tensor(sizes[0]), torch.as_tensor(sizes[1]))
    else:
        same = sizes[0] == sizes[1]
    if not same:
        raise AssertionError(f"{prefix}image sizes differ: {sizes[0]} and {sizes[1]}")
    ours, theirs = input.get_fields(), other.get_fields()
    if set(ours) != set(theirs):
        raise AssertionError(f"{prefix}fields differ: {sorted(ours)} and {sorted(theirs)}")
    for name, value in ours.items():
        _assert_field(name, value, theirs[name], rtol, prefix)


def _assert_field(name: str, value: Any, expected: Any, rtol: float, prefix: str) -> None:
    if not isinstance(value, Tensor) and isinstance(getattr(value, "tensor", None), Tensor):
        value, expected = value.tensor, expected.tensor
    if not isinstance(value, Tensor):
        if value != expected:
            raise AssertionError(f"{prefix}field '{name}' differs: {value!r} and {expected!r}")
        return
    if value.shape != expected.shape:
        shapes = f"{tuple(value.shape)} and {tuple(expected.shape)}"
        raise AssertionError(f"{prefix}field '{name}' differs in shape: {shapes}")
    if value.numel() == 0:
        return
    a, b = value.detach().double().cpu(), expected.detach().double().cpu()
    limit = rtol * float(b.abs().max())
    worst = float((a - b).abs().max())
    if not worst <= limit:
        raise AssertionError(f"{prefix}field '{name}' differs by {worst:g}, allowed {limit:g}")
