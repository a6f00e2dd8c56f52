"""`export_model`: a folder with the model's file, its metadata and the report of its check."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from d2kit import __version__
from d2kit.export.backends import CONFIG, FILES, METADATA, RUNNERS, ExportedModel, sha256
from d2kit.export.formats import ONNX_OPSET, WRITERS
from d2kit.export.graph import DetectorGraph, detector_graph
from d2kit.export.parity import TOLERANCE, compare, parity_pictures, worst
from d2kit.utils.file_io import atomic_write

__all__ = ["REPORT", "export_model"]

REPORT = "parity.json"


def export_model(
    model: nn.Module,
    kind: str,
    output: str | Path,
    image: np.ndarray,
    to_input: Callable[[np.ndarray], Tensor],
    *,
    metadata: Mapping[str, Any] | None = None,
    config: str | None = None,
    half: bool = False,
    calibration: Sequence[np.ndarray] = (),
) -> dict[str, Any]:
    """Write a model in another format, and keep it only if it gives what the model gives.

    Args:
        model: with its weights; not changed.
        kind: "torchscript", "onnx", "torch_export" or "openvino".
        output: folder to write; other files in it stay.
        image: (H, W, 3) uint8 that shows objects, as `to_input` takes it.
        to_input: image -> float32 (C, H', W'), as the model wants it.
        metadata: what else ``metadata.json`` shall hold: classes, sizes, thresholds.
        config: text of ``config.yaml``, which `d2kit.Predictor` needs; None: none.
        half: store weights in 16 bits (onnx, openvino).
        calibration: pictures by which activations are measured, to compute in 8 bits (onnx,
            openvino); differences are then reported and not refused.

    Returns:
        The report, which is also in the folder: per picture differences, and the largest of all.

    Raises:
        ValueError: if the model cannot be written so, or the export differs from it; no file stays.
        ImportError: if the format's package is missing.
    """
    if kind not in WRITERS:
        raise ValueError(f"unknown format '{kind}': expected one of {list(WRITERS)}")
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    written = [output / name for name in (*_files(kind), METADATA, REPORT, CONFIG)]
    _remove(written)
    original, graph = DetectorGraph(model.eval()), detector_graph(model)
    try:
        seen, file = [to_input(one) for one in calibration], output / FILES[kind]
        WRITERS[kind](graph, to_input(image), file, half, seen)
        graph(to_input(image))
        if config is not None:
            (output / CONFIG).write_text(config, encoding="utf-8")
        content = {**(metadata or {}), **_facts(model, graph, kind, half), "int8": bool(seen)}
        content["sha256"] = {part.name: sha256(part) for part in written if part.is_file()}
        exported = ExportedModel(RUNNERS[kind](file, torch.get_num_threads(), "cpu"), content)
        report = _check(original, exported, image, to_input, half)
        if report["problems"] and not seen:
            found = "; ".join(report["problems"][:5])
            raise ValueError(f"the {kind} export differs from the model and was deleted: {found}")
    except BaseException:
        _remove(written)
        raise
    for name, value in ((METADATA, content), (REPORT, report)):
        with atomic_write(output / name, "w") as stream:
            json.dump(value, stream, indent=1)
    return report


def _files(kind: str) -> list[str]:
    """Return the names of the files of a format."""
    return ["model.xml", "model.bin"] if kind == "openvino" else [FILES[kind]]


def _facts(model: nn.Module, graph: DetectorGraph, kind: str, half: bool) -> dict[str, Any]:
    """Return what a user of the file needs to know, beside its outputs."""
    return {
        "format": kind,
        "outputs": list(graph.output_names),
        "half": half,
        "d2kit": __version__,
        "opset": ONNX_OPSET if kind in ("onnx", "openvino") else None,
        "whole_pixel_masks": bool(getattr(model, "whole_pixel_masks", False)),
        "panoptic": _merging(model),
        "inside": "normalisation, padding, suppression",
        "outside": "resizing; scaling boxes to the picture; pasting masks; best positions of "
        "heat maps; merging of a panoptic segmentation",
        "batch": "one picture of any size per call",
    }


def _remove(files: list[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)


def _merging(model: nn.Module) -> dict[str, float] | None:
    """Return how a panoptic model merges its two parts, None for another model."""
    if not getattr(model, "combine", False):
        return None
    names = {
        "overlap_threshold": "combine_overlap_thresh",
        "stuff_area_thresh": "combine_stuff_area_thresh",
        "instances_score_thresh": "combine_instances_score_thresh",
    }
    return {name: float(getattr(model, attribute)) for name, attribute in names.items()}


def _check(
    original: DetectorGraph,
    exported: ExportedModel,
    image: np.ndarray,
    to_input: Callable[[np.ndarray], Tensor],
    half: bool,
) -> dict[str, Any]:
    """Run both on the picture and on others, and report the differences."""
    threshold = float(exported.metadata.get("score_threshold") or 0.0)
    pictures: dict[str, dict[str, Any]] = {}
    for name, picture in {"the picture": image, **parity_pictures(image)}.items():
        inputs = to_input(picture)
        with torch.no_grad():
            device: Any = original.model.device
            expected = original(inputs.to(device))
        named = dict(zip(original.output_names, (x.cpu() for x in expected), strict=True))
        try:
            found = exported.raw(inputs)
        except RuntimeError as error:
            message = str(error).strip().splitlines()[-1][:300]
            pictures[name] = {"problems": [f"does not run: {message}"]}
            continue
        pictures[name] = {
            "size": [int(side) for side in inputs.shape[1:]],
            **compare(named, found, threshold=threshold, half=half),
        }
    problems = [f"{name}: {p}" for name, report in pictures.items() for p in report["problems"]]
    return {
        "tolerance": TOLERANCE,
        "half": half,
        "worst": worst(list(pictures.values())),
        "detections": sum(report.get("detections", 0) for report in pictures.values()),
        "pictures": pictures,
        "problems": problems,
    }
