"""`export_model`: a folder with the model's file, its metadata and the report of its check."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from d2kit import __version__
from d2kit.export.backends import CONFIG, FILES, METADATA, RUNNERS, ExportedModel, sha256
from d2kit.export.formats import ONNX_OPSET, WRITERS, DetectorGraph, detector_graph
from d2kit.utils.file_io import atomic_write

__all__ = [
    "REPORT",
    "TOLERANCE",
    "compare",
    "export_model",
    "parity_pictures",
]


TOLERANCE = {"boxes": 0.1, "scores": 2e-3, "masks": 0.02, "maps": 0.01, "classes": 0.001}
"""How far outputs may be apart: boxes in pixels; scores and mask probabilities; heat maps and
scores of pixels as a share of their largest; the share of pixels that change their class, and of
proposals that find no partner."""

_HALF = 25  # weights of 16 bits keep 3 digits


def parity_pictures(image: np.ndarray) -> dict[str, np.ndarray]:
    """Return pictures of other sizes and contents than `image`.

    Args:
        image: (H, W, 3) uint8.

    Returns:
        Name -> (H', W', 3) uint8: turned by 90 degrees, the left two thirds mirrored, two copies
        side by side with many objects, and a faint gradient without any.
    """
    height, width = image.shape[:2]
    # not one grey: all its places score the same, and which of them are kept is chance
    rows, columns = np.mgrid[0 : max(1, height * 3 // 4), 0:width]
    gradient = 90 + 30 * rows / height + 20 * columns / width
    pictures = {
        "turned": np.rot90(image),
        "cut and mirrored": image[:, : max(1, width * 2 // 3)][:, ::-1],
        "two side by side": np.concatenate([image, image[::-1]], axis=1),
        "empty": np.repeat(gradient[..., None], 3, axis=2).astype(np.uint8),
    }
    return {name: np.ascontiguousarray(picture) for name, picture in pictures.items()}


def compare(
    expected: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    *,
    threshold: float = 0.0,
    half: bool = False,
) -> dict[str, Any]:
    """Compare the outputs for one picture.

    Detections are paired by class and place, since equal scores have no order. One without a
    partner counts, unless its score is within the tolerance of the score threshold or of the
    lowest kept score.

    Args:
        expected: outputs of the model, names as of `d2kit.export.formats.DetectorGraph`.
        found: those of the export; more may be expected than found.
        threshold: score below which the model drops detections.
        half: whether weights have 16 bits, for which the tolerance is 25 times larger.

    Returns:
        ``detections``: how many are expected; ``without_partner``; per kind of output the largest
        difference; ``problems``: list of sentences, empty where the two agree.
    """
    factor = _HALF if half else 1
    limit = {name: value * factor for name, value in TOLERANCE.items()}
    report: dict[str, Any] = {"problems": []}
    boxes = next((name for name in found if name.endswith("_boxes")), None)
    if boxes is not None:
        _compare_rows(expected, found, boxes, threshold, limit, report)
    if "sem_seg" in found:
        _compare_pixels(expected["sem_seg"], found["sem_seg"], limit, report)
    return report


def _compare_rows(
    expected: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    boxes: str,
    threshold: float,
    limit: dict[str, float],
    report: dict[str, Any],
) -> None:
    score = "scores" if "scores" in found else "objectness_logits"
    pairs, alone = _pairs(expected, found, boxes, score)
    lowest = min([float(x[score].min()) for x in (expected, found) if len(x[score])], default=0.0)
    lost = [s for s in alone if min(abs(s - lowest), abs(s - threshold)) > limit["scores"]]
    total = len(expected[boxes])
    report["detections"], report["without_partner"] = total, len(lost)
    allowed = limit["classes"] * 10 * total if boxes == "proposal_boxes" else 0
    if len(lost) > allowed:
        report["problems"].append(
            f"{len(lost)} of {total} expected and {len(found[boxes])} found have no partner"
        )
    rows = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).unbind(1)
    for name in found:
        if name in ("pred_classes", "sem_seg"):
            continue
        a, b = expected[name][rows[0]].float(), found[name][rows[1]].float()
        apart = float((a - b).abs().max()) if a.numel() else 0.0
        kind = "boxes" if name == boxes else "masks" if name == "pred_masks" else "scores"
        if name in ("pred_keypoint_heatmaps", "objectness_logits"):
            kind = "maps"
            apart /= max(1.0, float(a.abs().max()) if a.numel() else 1.0)
        _note(report, name, apart, limit[kind])


def _pairs(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], boxes: str, score: str
) -> tuple[list[tuple[int, int]], list[float]]:
    """Return pairs of rows of one class, nearest first, and the scores of those left alone."""
    a, b = expected[boxes], found[boxes]
    if len(a) == 0 or len(b) == 0:
        return [], [float(s) for s in [*expected[score], *found[score]]]
    apart = (a[:, None] - b).abs().amax(dim=2)
    apart = apart + 100 * (expected[score][:, None] - found[score]).abs()
    if "pred_classes" in found:
        apart[expected["pred_classes"][:, None] != found["pred_classes"]] = float("inf")
    pairs = []
    while True:
        best = int(apart.argmin())
        row, column = divmod(best, apart.shape[1])
        if not apart[row, column] < 5:  # another object
            break
        pairs.append((row, column))
        apart[row], apart[:, column] = float("inf"), float("inf")
    rows, columns = {i for i, _ in pairs}, {j for _, j in pairs}
    alone = [float(s) for i, s in enumerate(expected[score]) if i not in rows]
    return pairs, alone + [float(s) for j, s in enumerate(found[score]) if j not in columns]


def _compare_pixels(
    expected: Tensor, found: Tensor, limit: dict[str, float], report: dict[str, Any]
) -> None:
    if expected.shape != found.shape:
        report["problems"].append(
            f"sem_seg has shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
        )
        return
    apart = float((expected - found).abs().max()) / max(1.0, float(expected.abs().max()))
    changed = float((expected.argmax(0) != found.argmax(0)).float().mean())
    _note(report, "sem_seg", apart, limit["maps"])
    _note(report, "changed pixels", changed, limit["classes"])


def _note(report: dict[str, Any], name: str, apart: float, limit: float) -> None:
    report[name] = apart
    if not apart <= limit:
        report["problems"].append(f"{name} are {apart:.3g} apart, more than {limit:g}")


def worst(reports: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the largest difference of each output over several pictures."""
    found: dict[str, float] = {}
    for report in reports:
        for name, value in report.items():
            if isinstance(value, float):
                found[name] = max(found.get(name, 0.0), value)
    return found


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
    file = output / FILES[kind]
    with _all_or_nothing(written, file):
        seen = [to_input(one) for one in calibration]
        WRITERS[kind](graph, to_input(image), file, half, seen)
        graph(to_input(image))
        if config is not None:
            with atomic_write(output / CONFIG, "w") as stream:
                stream.write(config)
        content = {**(metadata or {}), **_facts(model, graph, kind, half), "int8": bool(seen)}
        content["sha256"] = {part.name: sha256(part) for part in written if part.is_file()}
        exported = ExportedModel(RUNNERS[kind](file, torch.get_num_threads(), "cpu"), content)
        report = _check(original, exported, image, to_input, half)
        if report["problems"] and not seen:
            found = "; ".join(report["problems"][:5])
            raise ValueError(f"the {kind} export differs from the model and was deleted: {found}")
        for name, value in ((METADATA, content), (REPORT, report)):
            with atomic_write(output / name, "w") as stream:
                json.dump(value, stream, indent=1)
    return report


@contextmanager
def _all_or_nothing(files: list[Path], named: Path) -> Iterator[None]:
    """Remove the files after an error; let a full disk name one, which writers do not."""
    try:
        yield
    except BaseException as error:
        _remove(files)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            raise OSError(error.errno, error.strerror, str(named)) from error
        raise


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
