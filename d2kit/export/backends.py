"""Exported models behind Detectron2's model contract: list of dicts in, list of dicts out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2kit.modeling.meta_arch.panoptic_fpn import combine_semantic_and_instance_outputs
from d2kit.modeling.postprocessing import detector_postprocess, sem_seg_postprocess
from d2kit.structures import Boxes, Instances, ROIMasks, heatmaps_to_keypoints
from d2kit.utils.file_io import load_json

__all__ = ["FILES", "METADATA", "ExportedModel", "load_exported", "sha256"]

METADATA = "metadata.json"
FILES = {
    "torchscript": "model.ts",
    "onnx": "model.onnx",
    "torch_export": "model.pt2",
    "openvino": "model.xml",
    "d2kit": "model_final.pth",
}
"""The file of each format in the folder of an export."""

_Runner = Callable[[Tensor], Sequence[Any]]


class ExportedModel:
    """An exported model that stands where the model stood.

    Args:
        run: float32 (C, H, W) on the CPU -> arrays or tensors in the order of
            ``metadata["outputs"]``, see `d2kit.export.graph.DetectorGraph`.
        metadata: content of ``metadata.json``.

    Attributes:
        metadata: see there.
        device: where images are wanted: the CPU.
    """

    training = False

    def __init__(self, run: _Runner, metadata: dict[str, Any]) -> None:
        self.run = run
        self.metadata = metadata
        self.device = torch.device("cpu")

    def eval(self) -> ExportedModel:
        """Return the model itself, which has no other mode."""
        return self

    def __call__(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Detect in images, one after the other.

        Args:
            batched_inputs: per image a dict with `image` (C, H, W), values in 0..255, resized and
                with channels as the metadata say; `height` and `width` of the wanted result, by
                default the image's.

        Returns:
            What the model returns: per image a dict with, by its kind, `instances`, `proposals`,
            `sem_seg`, `panoptic_seg`.
        """
        return [self._one(item) for item in batched_inputs]

    def raw(self, image: Tensor) -> dict[str, Tensor]:
        """Return the outputs of the graph for one image (C, H, W) by their names."""
        found = self.run(image.detach().cpu().float().contiguous())
        tensors = [x if isinstance(x, Tensor) else torch.from_numpy(np.array(x)) for x in found]
        return dict(zip(self.metadata["outputs"], tensors, strict=True))

    def _one(self, item: dict[str, Any]) -> dict[str, Any]:
        image = item["image"]
        height, width = int(image.shape[-2]), int(image.shape[-1])
        wanted = int(item.get("height", height)), int(item.get("width", width))
        found = self.raw(image)
        result: dict[str, Any] = {}
        if "proposal_boxes" in found or "pred_boxes" in found:
            name = "proposals" if "proposal_boxes" in found else "instances"
            result[name] = detector_postprocess(self._instances(found, (height, width)), *wanted)
        if "sem_seg" in found:
            result["sem_seg"] = sem_seg_postprocess(found["sem_seg"], (height, width), *wanted)
        if self.metadata.get("panoptic"):
            result["panoptic_seg"] = combine_semantic_and_instance_outputs(
                result["instances"], result["sem_seg"].argmax(dim=0), **self.metadata["panoptic"]
            )
        return result

    def _instances(self, found: dict[str, Tensor], size: tuple[int, int]) -> Instances:
        """Return the detections in pixels of the image that the graph saw."""
        instances = Instances(size)
        for name, value in found.items():
            if name.endswith("_boxes"):
                instances.set(name, Boxes(value))
            elif name == "pred_masks":
                whole = self.metadata.get("whole_pixel_masks", False)
                instances.set(name, ROIMasks(value, whole_pixels=whole))
            elif name != "sem_seg":
                instances.set(name, value.long() if name == "pred_classes" else value)
        if "pred_keypoint_heatmaps" in found:
            points = heatmaps_to_keypoints(found["pred_keypoint_heatmaps"], found["pred_boxes"])
            instances.pred_keypoints = points[:, :, [0, 1, 3]]
        return instances


def load_exported(folder: str | Path, *, threads: int | None = None) -> ExportedModel:
    """Load what `d2kit export` wrote.

    Args:
        folder: with ``metadata.json`` and the model's file.
        threads: of the CPU that onnxruntime and OpenVINO use; None: their choice.

    Returns:
        The model, called as the original is.

    Raises:
        FileNotFoundError: if the folder is no export.
        ValueError: if the file is not the one that was checked (digest).
        ImportError: if the format's package is not installed.
    """
    folder = Path(folder)
    file = folder / METADATA
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} is no exported model: it has no {METADATA}; `d2kit export` writes one"
        )
    metadata = load_json(file)
    digests = metadata.get("sha256") if isinstance(metadata, dict) else None
    if not isinstance(digests, dict) or not isinstance(metadata.get("format"), str):
        raise ValueError(f"{file} is not of an exported model: it names no format and digests")
    kind = metadata["format"]
    if kind not in FILES:
        raise ValueError(f"{file}: format '{kind}' is not known, expected one of {list(FILES)}")
    for name, digest in digests.items():
        part = folder / name
        if part.parent != folder or not name:
            raise ValueError(f"{file}: sha256: expected names of files beside it, got {name!r}")
        if not part.is_file():
            raise FileNotFoundError(f"{part} is missing: {file} names it")
        if sha256(part) != digest:
            raise ValueError(f"{part} is not the file that was checked when it was exported")
    if kind == "d2kit":
        raise ValueError(
            f"{folder} holds a model of d2kit itself: give its config.yaml and model_final.pth"
        )
    if FILES[kind] not in digests:
        raise ValueError(f"{file}: sha256: '{FILES[kind]}' of format '{kind}' is not in it")
    try:
        runner = RUNNERS[kind](folder / FILES[kind], threads)
    except ImportError:
        raise
    except Exception as error:  # each backend has exceptions of its own
        raise ValueError(f"{folder / FILES[kind]}: cannot be loaded as {kind}: {error}") from error
    return ExportedModel(runner, metadata)


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _missing(package: str, extra: str, error: ImportError) -> ImportError:
    return ImportError(
        f"this format needs the package '{package}': pip install 'd2kit[{extra}]' ({error})"
    )


def _run_torchscript(file: Path, threads: int | None) -> _Runner:
    import torchvision  # noqa: F401 - registers the operators of the file

    del threads  # those of torch.set_num_threads
    model = torch.jit.load(str(file), map_location="cpu")

    def run(image: Tensor) -> Sequence[Tensor]:
        with torch.no_grad():
            found = model(image)
        return (found,) if isinstance(found, Tensor) else found

    return run


def _run_torch_export(file: Path, threads: int | None) -> _Runner:
    import torchvision  # noqa: F401 - registers the operators of the file

    del threads
    model = torch.export.load(str(file)).module()

    def run(image: Tensor) -> Sequence[Tensor]:
        with torch.no_grad():
            return model(image)

    return run


def _run_onnx(file: Path, threads: int | None) -> _Runner:
    try:
        import onnxruntime
    except ImportError as error:
        raise _missing("onnxruntime", "onnx", error) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        str(file), options, providers=onnxruntime.get_available_providers()
    )
    return lambda image: session.run(None, {"image": image.numpy()})


def _run_openvino(file: Path, threads: int | None) -> _Runner:
    try:
        import openvino
    except ImportError as error:
        raise _missing("openvino", "openvino", error) from error
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(str(file)), "CPU", settings)

    def run(image: Tensor) -> Sequence[np.ndarray]:
        found = compiled([image.numpy()])
        return [found[output] for output in compiled.outputs]

    return run


RUNNERS: dict[str, Callable[[Path, int | None], _Runner]] = {
    "torchscript": _run_torchscript,
    "onnx": _run_onnx,
    "torch_export": _run_torch_export,
    "openvino": _run_openvino,
}
"""How the file of each format is run."""
