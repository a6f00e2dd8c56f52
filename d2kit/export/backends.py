"""Exported models behind Detectron2's model contract: list of dicts in, list of dicts out."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2kit.config import CfgNode, get_cfg
from d2kit.modeling.facts import build_facts
from d2kit.modeling.meta_arch.panoptic_fpn import combine_semantic_and_instance_outputs
from d2kit.modeling.postprocessing import detector_postprocess, sem_seg_postprocess
from d2kit.structures import Boxes, Instances, ROIMasks, heatmaps_to_keypoints
from d2kit.utils.file_io import load_json
from d2kit.utils.names import flatten

__all__ = [
    "CONFIG",
    "EVALUATION",
    "FILES",
    "METADATA",
    "ExportedModel",
    "build_exported",
    "is_exported",
    "load_exported",
    "read_config",
    "sha256",
]

logger = logging.getLogger(__name__)

METADATA = "metadata.json"
CONFIG = "config.yaml"
EVALUATION = "evaluation"
"""OUTPUT_DIR of an export, in its folder: what evaluates it must not write over the training."""
FILES = {
    "torchscript": "model.ts",
    "onnx": "model.onnx",
    "torch_export": "model.pt2",
    "openvino": "model.xml",
    "d2kit": "model_final.pth",
}
"""The file of each format in the folder of an export."""

TRAINED = (
    *("model_best_ema.safetensors", "model_best.pth"),
    *("model_final_ema.safetensors", "model_final.pth"),
)
"""Weights that a training leaves, those that its results page judges first."""

_Runner = Callable[[Tensor], Sequence[Any]]

_FREE = ("MODEL.COMPILE", "MODEL.DEVICE", "MODEL.WEIGHTS", "MODEL.CLASS_NAMES")
_FIXED = ("INPUT.FORMAT", "TEST.DETECTIONS_PER_IMAGE")
"""Config keys outside of the file though in MODEL, and inside of it though not."""


class ExportedModel:
    """An exported model that stands where the model stood.

    Args:
        run: float32 (C, H, W) on the CPU -> arrays or tensors in the order of
            ``metadata["outputs"]``, see `d2kit.export.formats.DetectorGraph`.
        metadata: content of ``metadata.json``.
        least_score: detections with a score not above it are left out, in [0, 1]; those that the
            file itself drops are never there.

    Attributes:
        metadata: see there.
        least_score: see there.
        device: where images are wanted: the CPU.
    """

    training = False

    def __init__(
        self, run: _Runner, metadata: dict[str, Any], *, least_score: float | None = None
    ) -> None:
        self.run = run
        self.metadata = metadata
        self.least_score = least_score
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
        if self.least_score is not None:
            instances = instances[instances.scores > self.least_score]
        return instances


def is_exported(path: str | os.PathLike[str]) -> bool:
    """Tell whether `path` is a folder that ``d2kit export`` or ``--to d2kit-folder`` wrote."""
    return bool(os.fspath(path)) and os.path.isfile(os.path.join(path, METADATA))


def read_config(path: str | os.PathLike[str]) -> CfgNode:
    """Read the config of a YAML file, or of an export or training, whose model it then names.

    Args:
        path: a YAML file; the folder of an export: MODEL.WEIGHTS is then the folder (the file in
            it, if it holds a model of d2kit itself), OUTPUT_DIR the folder ``evaluation`` in it; or
            the folder of a training: MODEL.WEIGHTS is then the first of `TRAINED` in it.

    Raises:
        FileNotFoundError: if there is no such file, or the folder is neither.
        ValueError: if a file of the export is not the one that was checked (digest).
    """
    cfg = get_cfg()
    if not os.path.isdir(path):
        cfg.merge_from_file(path)
        return cfg
    folder = Path(path)
    trained = next((name for name in TRAINED if (folder / name).is_file()), None)
    if not (folder / METADATA).exists() and (folder / CONFIG).is_file() and trained is not None:
        cfg.merge_from_file(folder / CONFIG)
        cfg.merge_from_list(["MODEL.WEIGHTS", str(folder / trained)])
        logger.info("%s is the folder of a training: its weights are %s", folder, trained)
        return cfg
    metadata = _read_metadata(folder)
    kind = metadata["format"]
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(
            f"{folder} has no {CONFIG}: `d2kit export` writes one; a folder of `export_model` "
            "alone is run by d2kit.export.load_exported"
        )
    # a file of d2kit itself goes to the checkpointer, the others to `load_exported`, which checks
    _check_digests(folder, metadata, () if kind == "d2kit" else (CONFIG,))
    cfg.merge_from_file(folder / CONFIG)
    weights = folder / FILES[kind] if kind == "d2kit" else folder
    cfg.merge_from_list(["MODEL.WEIGHTS", str(weights), "OUTPUT_DIR", str(folder / EVALUATION)])
    return cfg


def build_exported(cfg: CfgNode) -> ExportedModel:
    """Build the exported model that MODEL.WEIGHTS names.

    Args:
        cfg: the config of `read_config`. What is inside the file can no longer be changed; the
            sizes of INPUT, the device and a higher score threshold can.

    Raises:
        ValueError: if a key that is inside the file has another value than when it was exported.
        FileNotFoundError: see `load_exported`.
        ImportError: see `load_exported`.
    """
    stored = read_config(cfg.MODEL.WEIGHTS)
    if cfg.TEST.DTYPE != stored.TEST.DTYPE:
        raise ValueError(
            f"TEST.DTYPE is {cfg.TEST.DTYPE!r}, but the exported model {cfg.MODEL.WEIGHTS} "
            "computes in the type that it was written with: leave it out (`d2kit export --int8` is "
            "faster)"
        )
    score_key = build_facts(stored).score_key
    before, now = flatten(stored), flatten(cfg)
    for key, value in now.items():
        inside = (key.startswith("MODEL.") and key not in _FREE) or key in _FIXED
        if not inside or value == before.get(key):
            continue
        if key == score_key and value > before[key]:
            continue
        raise ValueError(
            f"{key} is {value!r} here and {before.get(key)!r} inside the exported model "
            f"{cfg.MODEL.WEIGHTS}: leave it, or export the model again with {key} {value}"
        )
    model = load_exported(cfg.MODEL.WEIGHTS, device=cfg.MODEL.DEVICE)
    if score_key is not None and now[score_key] > before[score_key]:
        model.least_score = now[score_key]
    return model


def load_exported(
    folder: str | Path, *, threads: int | None = None, device: str = "cpu"
) -> ExportedModel:
    """Load what `d2kit export` wrote.

    Args:
        folder: with ``metadata.json`` and the model's file.
        threads: of the CPU that onnxruntime and OpenVINO use; None: as many as torch.
        device: "cpu"; "cuda" lets onnxruntime use a GPU where the installed one can, the other
            formats run on the CPU.

    Returns:
        The model, called as the original is.

    Raises:
        FileNotFoundError: if the folder is no export.
        ValueError: if the file is not the one that was checked (digest).
        ImportError: if the format's package is not installed.
    """
    folder = Path(folder)
    metadata = _read_metadata(folder)
    kind = metadata["format"]
    _check_digests(folder, metadata)
    if kind == "d2kit":
        raise ValueError(
            f"{folder} holds a model of d2kit itself: d2kit.Predictor('{folder}') runs it"
        )
    if device != "cpu" and kind != "onnx":
        logger.info("%s: an export as %s runs on the CPU, not on %s", folder, kind, device)
    file = folder / FILES[kind]
    try:
        run = RUNNERS[kind](file, threads or torch.get_num_threads(), device)
    except ImportError:
        raise
    except Exception as error:  # each backend has exceptions of its own
        raise ValueError(f"{file}: cannot be loaded as {kind}: {error}") from error
    return ExportedModel(run, metadata)


def _read_metadata(folder: Path) -> dict[str, Any]:
    file = folder / METADATA
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} is no exported model: it has no {METADATA}, which `d2kit export` writes; "
            f"nor the folder of a training, with {CONFIG} and one of {', '.join(TRAINED)}"
        )
    metadata: dict[str, Any] = load_json(file)
    digests = metadata.get("sha256") if isinstance(metadata, dict) else None
    if not isinstance(digests, dict) or not isinstance(metadata.get("format"), str):
        raise ValueError(f"{file} is not of an exported model: it names no format and digests")
    kind = metadata["format"]
    if kind not in FILES:
        raise ValueError(f"{file}: format '{kind}' is not known, expected one of {list(FILES)}")
    for name in digests:
        if (folder / name).parent != folder or not name:
            raise ValueError(f"{file}: sha256: expected names of files beside it, got {name!r}")
    if FILES[kind] not in digests:
        raise ValueError(f"{file}: sha256: '{FILES[kind]}' of format '{kind}' is not in it")
    return metadata


def _check_digests(folder: Path, metadata: dict[str, Any], names: Sequence[str] = ()) -> None:
    """Refuse files that are not those that were checked; no names: all."""
    for name, digest in metadata["sha256"].items():
        if names and name not in names:
            continue
        part = folder / name
        if not part.is_file():
            raise FileNotFoundError(f"{part} is missing: {METADATA} names it")
        if sha256(part) != digest:
            raise ValueError(
                f"{part} is not the file that was checked when it was exported (another SHA-256 "
                f"than in {METADATA}): export again; keys of the config are given as KEY VALUE"
            )


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


def _run_torchscript(file: Path, threads: int, device: str) -> _Runner:
    import torchvision  # noqa: F401 - registers the operators of the file

    del threads, device  # those of torch.set_num_threads; the trace holds tensors of the CPU
    model = torch.jit.load(str(file), map_location="cpu")

    def run(image: Tensor) -> Sequence[Tensor]:
        with torch.no_grad():
            found = model(image)
        return (found,) if isinstance(found, Tensor) else found

    return run


def _run_torch_export(file: Path, threads: int, device: str) -> _Runner:
    import torchvision  # noqa: F401 - registers the operators of the file

    del threads, device
    model = torch.export.load(str(file)).module()

    def run(image: Tensor) -> Sequence[Tensor]:
        with torch.no_grad():
            found: Sequence[Tensor] = model(image)
            return found

    return run


def _run_onnx(file: Path, threads: int, device: str) -> _Runner:
    try:
        import onnxruntime
    except ImportError as error:
        raise _missing("onnxruntime", "onnx", error) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    providers = ["CPUExecutionProvider"]
    if device.startswith("cuda"):
        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            providers.insert(0, "CUDAExecutionProvider")
        else:
            logger.warning("the installed onnxruntime has no CUDA (onnxruntime-gpu has): the CPU")
    session = onnxruntime.InferenceSession(str(file), options, providers=providers)

    def run(image: Tensor) -> Sequence[Any]:
        try:
            return list(session.run(None, {"image": image.numpy()}))
        except Exception as error:  # its classes have no base of their own
            raise RuntimeError(f"onnxruntime cannot run {file}: {error}") from error

    return run


def _run_openvino(file: Path, threads: int, device: str) -> _Runner:
    try:
        import openvino
    except ImportError as error:
        raise _missing("openvino", "openvino", error) from error
    del device
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(str(file)), "CPU", settings)

    def run(image: Tensor) -> Sequence[np.ndarray]:
        found = compiled([image.numpy()])
        return [found[output] for output in compiled.outputs]

    return run


RUNNERS: dict[str, Callable[[Path, int, str], _Runner]] = {
    "torchscript": _run_torchscript,
    "onnx": _run_onnx,
    "torch_export": _run_torch_export,
    "openvino": _run_openvino,
}
"""How the file of each format is run."""
