"""Loss and metrics of each epoch of a training, as a table and as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from d2kit.utils.file_io import atomic_write

__all__ = ["EPOCH_LOSS", "epoch_rows", "plot_epochs", "table_of_epochs"]

EPOCH_LOSS = "epoch/total_loss"
_LOSSES = {EPOCH_LOSS: "training loss", "validation/total_loss": "validation loss"}
_PERCENT = {
    "class_by_image/accuracy": "accuracy by image",
    "bbox/AP": "box AP",
    "segm/AP": "mask AP",
    "keypoints/AP": "keypoint AP",
}
_COLORS = ("#d1495b", "#e07a00", "#5b2a86", "#00796b")

NEAR = 0.2  # epochs; evaluations come every so many whole iterations, which are not quite an epoch
Row = dict[str, float]


def epoch_rows(metrics: Sequence[Mapping[str, Any]], per_epoch: float, max_iter: int) -> list[Row]:
    """Gather what is known of each epoch.

    Args:
        metrics: of `read_metrics`.
        per_epoch: iterations in one pass over the training set.
        max_iter: iterations of the training; the evaluation after the last one is written there.

    Returns:
        In order of ``epoch`` (a whole number at or near the end of one): a dict with ``epoch``,
        ``iterations`` done by then, and those of `_LOSSES` and `_PERCENT` that were written, of
        the first dataset that has them; NaN for what was not finite.
    """
    rows: dict[float, Row] = {}
    for line in metrics:
        done = min(int(line["iteration"]) + 1, max_iter)
        for key in (*_LOSSES, *_PERCENT):
            name = next((n for n in line if n == key or n.endswith(f"/{key}")), None)
            if name is not None:
                value = line[name]
                epoch = _epoch(done, per_epoch)
                row = rows.setdefault(epoch, {"epoch": epoch, "iterations": done})
                row[key] = math.nan if value is None else float(value)
    return [rows[epoch] for epoch in sorted(rows)]


def _epoch(done: int, per_epoch: float) -> float:
    passes = done / per_epoch
    nearest = max(round(passes), 1)
    at_end = done == round(nearest * per_epoch) or abs(passes - nearest) < NEAR
    return nearest if at_end else round(passes, 2)


def _columns(rows: Sequence[Row]) -> dict[str, str]:
    """Return key -> title of what the rows hold."""
    return {k: t for k, t in {**_LOSSES, **_PERCENT}.items() if any(k in row for row in rows)}


def table_of_epochs(rows: Sequence[Row]) -> str:
    """Return the rows of `epoch_rows` as a table; losses with three digits, percent with one."""
    from tabulate import tabulate

    columns = _columns(rows)

    def cell(row: Row, key: str) -> str:
        return f"{row[key]:.{3 if key in _LOSSES else 1}f}" if key in row else ""

    cells = [
        [f"{row['epoch']:g}", f"{row['iterations']:g}", *(cell(row, key) for key in columns)]
        for row in rows
    ]
    head = ["epoch", "iterations", *columns.values()]
    align = ["right"] * len(head)
    return tabulate(cells, head, tablefmt="github", colalign=align, disable_numparse=True)


def plot_epochs(rows: Sequence[Row], out_png: str | Path) -> Path:
    """Draw the losses (left axis) and the metrics in percent (right axis) over the epochs.

    Args:
        rows: of `epoch_rows`, at least one.
        out_png: picture to write; the ending names the format.

    Returns:
        The path of the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9.6, 5.4), dpi=125, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    columns = _columns(rows)
    right = axes.twinx() if any(k in _PERCENT for k in columns) else axes
    percent = iter(_COLORS)
    for key, title in columns.items():
        points = [(row["epoch"], row[key]) for row in rows if math.isfinite(row.get(key, math.nan))]
        x, y = zip(*points, strict=True) if points else ((), ())
        if key in _LOSSES:
            style = "-" if key == EPOCH_LOSS else "--"
            axes.plot(x, y, f"o{style}", color="#1f6f9f", markersize=4, label=title)
        else:
            color = next(percent)
            right.plot(x, y, "s--", color=color, markersize=5, linewidth=1.2, clip_on=False)
            last = f": {y[-1]:.1f}" if points else ""
            axes.plot([], [], "s--", color=color, label=f"{title}{last} (right)")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=len(rows) > 1))
    axes.grid(alpha=0.25)
    if right is not axes:
        right.set_ylim(0, 100)
        right.set_ylabel("%")
    figure.legend(loc="outside upper center", ncols=min(len(columns), 4), fontsize=9, frameon=False)
    path = Path(out_png)
    with atomic_write(path) as file:
        figure.savefig(file, format=path.suffix.lstrip(".") or "png")
    return path
