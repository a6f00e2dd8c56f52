"""Whether an exported model gives what the model gives, within a stated tolerance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["TOLERANCE", "compare", "parity_pictures"]

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
        expected: outputs of the model, names as of `d2kit.export.graph.DetectorGraph`.
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
