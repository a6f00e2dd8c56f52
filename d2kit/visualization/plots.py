"""Curves of a training run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from d2kit.utils.file_io import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_AP_KEYS = ("bbox/AP", "segm/AP", "keypoints/AP")
_COLORS = ("#1f6f9f", "#d1495b", "#3a7d44", "#8d5a97", "#c17817", "#4f6d7a", "#7a6c5d", "#2a9d8f")


def read_metrics(metrics_json: str | Path) -> list[dict[str, Any]]:
    """Read the lines that `JSONWriter` wrote.

    Args:
        metrics_json: file of one JSON object per line. A last line that was cut off is left out,
            and so are earlier values of iterations that a resumed run did again.

    Returns:
        The objects in rising ``iteration``, each iteration's values merged; values that were not
        finite are None.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = Path(metrics_json)
    if not path.is_file():  # a pipe would be waited for
        raise FileNotFoundError(f"There is no metrics file {path}; has the training begun?")
    merged: dict[int, dict[str, Any]] = {}
    # a kill or a full disk leaves damaged lines, which tell nothing
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("iteration")) is int:
            merged.setdefault(row["iteration"], {}).update(row)
    return [merged[iteration] for iteration in sorted(merged)]


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return iterations and finite values of one key."""
    pairs = [(row["iteration"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
    data = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    data = data[np.isfinite(data[:, 1])]
    return data[:, 0], data[:, 1]


def _loss_keys(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    names = {key for row in rows for key in row if "loss" in key and "/" not in key}
    return sorted(names - {"total_loss"})


def show_image(rgb: np.ndarray, ax: Axes | None = None) -> Axes:
    """Show an image without frame and ticks.

    Args:
        rgb: (H, W, 3) uint8.
        ax: axes to draw into; None: a new figure in which one pixel is at least one dot.

    Returns:
        The axes.
    """
    if ax is None:
        import matplotlib.pyplot as plt

        height, width = rgb.shape[:2]
        long_side = max(6.0, min(14.0, max(height, width) / 100))
        scale = long_side / max(height, width)
        figure = plt.figure(figsize=(width * scale, height * scale))
        ax = figure.add_axes((0, 0, 1, 1))
    ax.imshow(rgb)
    ax.set_axis_off()
    return ax


def plot_losses(metrics_json: str | Path, out_png: str | Path) -> Path:
    """Draw the losses of a run and, where it was evaluated, its AP.

    Args:
        metrics_json: ``metrics.json`` of a run.
        out_png: picture to write; the ending names the format.

    Returns:
        The path of the picture.

    Raises:
        FileNotFoundError: there is no `metrics_json`.
        ValueError: it holds no loss.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_metrics(metrics_json)
    iterations, total = _series(rows, "total_loss")
    parts = _loss_keys(rows)
    if len(iterations) == 0 and not parts:
        raise ValueError(f"{metrics_json} holds no loss: expected lines with total_loss")
    figure = Figure(figsize=(9.6, 5.4), dpi=125, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    highest = []
    for index, key in enumerate(parts):
        x, y = _series(rows, key)
        color = _COLORS[index % len(_COLORS)]
        axes.plot(x, y, color=color, linewidth=1.1, alpha=0.85, label=key)
        highest.append(y)
    if len(iterations):
        axes.plot(iterations, total, color="black", linewidth=2, label="total_loss")
        highest.append(total)
    values = np.concatenate(highest)
    if len(values):  # the first steps may be far above the rest
        axes.set_ylim(0, max(float(np.percentile(values, 99.5)) * 1.1, 1e-6))
    axes.set_xlabel("iteration")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.25)
    _plot_ap(axes, rows)
    handles, names = axes.get_legend_handles_labels()
    columns = 2 if len(names) > 6 else 1
    axes.legend(handles, names, loc="upper right", fontsize=8, ncols=columns, framealpha=0.9)
    path = Path(out_png)
    with atomic_write(path) as file:
        figure.savefig(file, format=path.suffix.lstrip(".") or "png")
    return path


def _plot_ap(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add the AP of each evaluation as points on an axis of their own."""
    keys = [key for key in _AP_KEYS if len(_series(rows, key)[0])]
    if not keys:
        return
    right = axes.twinx()
    order = sorted(keys, key=lambda key: -_series(rows, key)[1][-1])
    for key, color, marker in zip(keys, ("#e07a00", "#5b2a86", "#00796b"), "osD", strict=False):
        x, y = _series(rows, key)
        right.plot(x, y, marker + "--", color=color, markersize=6, linewidth=1)
        axes.plot([], [], marker + "--", color=color, label=f"{key} (right)")
        rank = order.index(key)  # labels one below the other; from the bottom upwards at low AP
        above = (
            6 + 12 * (len(order) - 1 - rank) if y[-1] < 10 else 6 if rank == 0 else -2 - 12 * rank
        )
        right.annotate(
            f"{y[-1]:.1f}", (x[-1], y[-1]), xytext=(-4, above), textcoords="offset points",
            ha="right", color=color, fontsize=9,
        )  # fmt: skip
    right.set_ylim(0, 100)
    right.set_ylabel("AP (%)")


def plot_confusion(
    panels: Mapping[str, tuple[np.ndarray, Sequence[str], Sequence[str]]], out_png: str | Path
) -> Path:
    """Draw confusion matrices side by side: counts, coloured by their share of the row.

    Args:
        panels: title -> (counts (rows, columns), names of the rows (truth), names of the columns).
        out_png: picture to write; the ending names the format.

    Returns:
        The path of the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sides = [max(len(rows), len(columns)) for _, rows, columns in panels.values()]
    side = 2.6 + 0.62 * max(sides)
    figure = Figure(figsize=(side * len(panels), side), dpi=125, layout="constrained")
    FigureCanvasAgg(figure)
    for i, (title, (counts, rows, columns)) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), i + 1)
        share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for y, x in np.ndindex(counts.shape):
            color = "white" if share[y, x] > 0.55 else "black"
            axes.text(x, y, f"{counts[y, x]}", ha="center", va="center", color=color, fontsize=9)
        axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right")
        axes.set_yticks(range(len(rows)), rows)
        axes.set_xlabel("found")
        axes.set_ylabel("truth")
        axes.set_title(title)
    path = Path(out_png)
    with atomic_write(path) as file:
        figure.savefig(file, format=path.suffix.lstrip(".") or "png")
    return path


EPOCH_LOSS = "epoch/total_loss"
_LOSSES = {EPOCH_LOSS: "training loss", "validation/total_loss": "validation loss"}
_PERCENT = {
    "class_by_image/accuracy": "accuracy by image",
    "bbox/AP": "box AP",
    "segm/AP": "mask AP",
    "keypoints/AP": "keypoint AP",
}
_EPOCH_COLORS = ("#d1495b", "#e07a00", "#5b2a86", "#00796b")

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
    percent = iter(_EPOCH_COLORS)
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
