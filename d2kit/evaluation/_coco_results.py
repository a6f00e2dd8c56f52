"""From COCO's precision array to the result dict and its tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from d2kit.utils.logger import create_small_table

METRICS: dict[str, tuple[str, ...]] = {
    "bbox": ("AP", "AP50", "AP75", "APs", "APm", "APl"),
    "segm": ("AP", "AP50", "AP75", "APs", "APm", "APl"),
    "keypoints": ("AP", "AP50", "AP75", "APm", "APl"),
}
_SELECTION: dict[str, tuple[float | None, str]] = {  # metric: (IoU or all, area range)
    "AP": (None, "all"),
    "AP50": (0.5, "all"),
    "AP75": (0.75, "all"),
    "APs": (None, "small"),
    "APm": (None, "medium"),
    "APl": (None, "large"),
}
_TABLE_WIDTH = 100  # characters
_LONGEST_NAME = 40  # characters


def _percent(precision: np.ndarray) -> float:
    """Mean of the defined (> -1) entries in percent; nan where there is none."""
    defined = precision[precision > -1]
    return float(np.mean(defined) * 100) if defined.size else float("nan")


def derive_results(
    coco_eval: Any, iou_type: str, class_names: Sequence[str] | None
) -> dict[str, float]:
    """Read AP figures from an accumulated COCO evaluation.

    Args:
        coco_eval: after `accumulate`: ``eval["precision"]`` is (T, R, K, A, M).
        iou_type: ``bbox``, ``segm`` or ``keypoints``.
        class_names: K names in the order of the category axis; None or one name: no figure per
            class.

    Returns:
        Percent; nan where no ground truth defines the figure. ``AP``, ``AP50``, ... and
        ``AP-<class>``.
    """
    precision = np.asarray(coco_eval.eval["precision"])
    areas = list(coco_eval.params.areaRngLbl)
    ious = np.asarray(coco_eval.params.iouThrs)
    results: dict[str, float] = {}
    for metric in METRICS[iou_type]:
        iou, area = _SELECTION[metric]
        chosen = precision if iou is None else precision[np.isclose(ious, iou)]
        results[metric] = _percent(chosen[..., areas.index(area), -1])
    if class_names is None or len(class_names) <= 1:
        return results
    if len(class_names) != precision.shape[2]:
        raise ValueError(
            f"{len(class_names)} class names for {precision.shape[2]} evaluated categories; the "
            "metadata's thing_classes and the annotation file do not belong together"
        )
    for index, name in enumerate(class_names):
        results[f"AP-{name}"] = _percent(precision[:, :, index, areas.index("all"), -1])
    return results


def summary_table(results: Mapping[str, float]) -> str:
    """Lay the figures that are not per class out as one row."""
    return create_small_table({k: v for k, v in results.items() if not k.startswith("AP-")})


def per_class_table(results: Mapping[str, float]) -> str:
    """Lay ``AP-<class>`` out in as many (class, AP) columns as 100 characters hold; "" if none."""
    rows = [(k[len("AP-") :], v) for k, v in results.items() if k.startswith("AP-")]
    if not rows:
        return ""
    cells = [
        (name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…", value)
        for name, value in rows
    ]
    table = ""
    for columns in range(min(4, len(cells)), 0, -1):
        table = _in_columns(cells, columns)
        if max(map(len, table.splitlines())) <= _TABLE_WIDTH:
            break
    return table


def _in_columns(cells: Sequence[tuple[str, float]], columns: int) -> str:
    """Fill `columns` pairs of columns, reading downwards."""
    from tabulate import tabulate

    height = math.ceil(len(cells) / columns)
    rows = [
        [value for cell in cells[row::height] for value in cell][: 2 * columns]
        for row in range(height)
    ]
    return tabulate(rows, headers=["class", "AP"] * columns, tablefmt="pipe", floatfmt=".3f")
