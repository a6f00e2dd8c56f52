"""One picture of a video: motion, spectrum, score, what was found; no picture of anybody in it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from project.patient_video.shaking import Interval, Rhythm, ShakingParams, Span
from project.patient_video.signals import UNKNOWN, Motion

FOUND, TRUE, QUIET = "#d1495b", "#3a7d44", "#4f6d7a"
MAX_COLUMNS = 1500  # of the spectrogram: no printer and no screen shows more


def plot_motion(
    motion: Motion,
    rhythm: Rhythm,
    intervals: Sequence[Interval],
    path: str | os.PathLike,
    *,
    params: ShakingParams | None = None,
    truth: Sequence[Span] | None = None,
    title: str = "",
) -> Path:
    """Draw the motion of the patient, its spectrogram, the score and the intervals.

    Args:
        motion: of the patient.
        rhythm: its short-time spectrum.
        intervals: found shaking.
        path: picture to write; the ending names the format.
        params: the limits that are drawn as lines.
        truth: true spells, where they are known.
        title: headline.

    Returns:
        `path`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from d2kit.utils.file_io import atomic_write

    p = params or ShakingParams()
    figure = Figure(figsize=(12, 8.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(4, 1, height_ratios=[2.2, 3, 1.6, 1.1])
    trace = figure.add_subplot(grid[0])
    others = [figure.add_subplot(grid[i], sharex=trace) for i in (1, 2, 3)]
    _trace(trace, motion)
    _spectrogram(others[0], rhythm, p)
    _score(others[1], rhythm, p)
    _timeline(others[2], motion, intervals, truth)
    for axes in (trace, others[1]):
        for i in intervals:
            axes.axvspan(i.start, i.end, color=FOUND, alpha=0.15, lw=0)
    for axes in (trace, *others[:2]):
        axes.tick_params(labelbottom=False)
    others[2].set_xlabel("time, s")
    if len(motion.times) > 1:
        trace.set_xlim(motion.times[0], motion.times[-1])
    figure.suptitle(title, fontsize=12)
    with atomic_write(path) as file:
        figure.savefig(file, format=Path(path).suffix.lstrip(".") or "png", dpi=110)
    return Path(path)


def _trace(axes, motion: Motion) -> None:  # noqa: ANN001 - matplotlib is not imported yet
    axes.plot(motion.times, 100 * motion.mask_change, color=QUIET, lw=0.9)
    axes.set_ylabel("mask change from\nframe to frame, % of area", fontsize=9)
    known = motion.mask_change[np.isfinite(motion.mask_change)]
    top = 130 * float(np.quantile(known, 0.995)) if len(known) else 1.0
    axes.set_ylim(0, max(top, 1.0))
    speed = axes.twinx()
    speed.plot(motion.times, motion.speed, color="#c17817", lw=0.7, alpha=0.7)
    known = motion.speed[np.isfinite(motion.speed)]
    speed.set_ylim(0, max(1.0, 1.3 * float(np.quantile(known, 0.995)) if len(known) else 1.0))
    speed.set_ylabel("centroid's speed, px/s", color="#c17817", fontsize=9)
    axes.grid(axis="x", alpha=0.3)


def _spectrogram(axes, rhythm: Rhythm, p: ShakingParams) -> None:  # noqa: ANN001
    shown = rhythm.frequencies <= p.ceiling + 0.3
    step = max(1, len(rhythm.times) // MAX_COLUMNS)
    power = rhythm.power[:, shown]
    if power.size and power.max() > 0:
        power = np.maximum.reduceat(power, np.arange(0, len(power), step)).T  # keeps short spells
        decibel = 10 * np.log10(np.maximum(power, 1e-12))
        moving = decibel[rhythm.frequencies[shown] >= p.floor]
        high = float(np.quantile(moving, 0.998)) if moving.size else float(decibel.max())
        axes.pcolormesh(
            rhythm.times[::step],
            rhythm.frequencies[shown],
            decibel,
            vmin=high - 30,
            vmax=high,
            cmap="magma",
            shading="nearest",
            rasterized=True,
        )
    sure = np.nan_to_num(rhythm.score) >= p.high
    dominant = np.where(sure, rhythm.frequency, np.nan)
    axes.plot(rhythm.times, dominant, color="white", lw=1.4, label="dominant frequency")
    for edge in p.band:
        axes.axhline(edge, color="cyan", lw=1, ls="--")
    axes.text(
        0.004,
        p.band[1] + 0.1,
        f"band {p.band[0]:g} to {p.band[1]:g} Hz",
        color="cyan",
        fontsize=8,
        transform=axes.get_yaxis_transform(),
        va="bottom",
    )
    axes.set_ylim(0, p.ceiling)
    axes.set_ylabel("frequency, Hz")


def _score(axes, rhythm: Rhythm, p: ShakingParams) -> None:  # noqa: ANN001
    axes.plot(rhythm.times, rhythm.score, color="#1f6f9f", lw=1.2)
    for level, name in ((p.high, "begins"), (p.low, "lasts")):
        axes.axhline(level, color="black", lw=0.7, ls=":")
        axes.text(1.002, level, name, fontsize=8, transform=axes.get_yaxis_transform(), va="center")
    axes.set_ylim(0, 1)
    axes.set_ylabel("score: share of\nmotion in the line", fontsize=9)
    axes.grid(axis="x", alpha=0.3)


def _timeline(axes, motion: Motion, intervals, truth) -> None:  # noqa: ANN001
    rows = [("found", intervals, FOUND)]
    if truth is not None:
        rows.append(("true", truth, TRUE))
    rows.append(("not seen", _unseen(motion), "#b0b0b0"))
    if (motion.coverage == UNKNOWN).any() and motion.observed.any():
        rows.append(("partly hidden", _hidden(motion), "#d8c9a8"))
    length = float(np.ptp(motion.times)) if len(motion.times) else 0.0
    for y, (_, items, colour) in enumerate(rows):
        for item in items:
            axes.broken_barh([(item.start, item.end - item.start)], (y - 0.4, 0.8), color=colour)
            if item.frequency and item.end - item.start > 0.04 * length:
                axes.text(
                    (item.start + item.end) / 2,
                    y,
                    f"{item.frequency:.1f} Hz",
                    color="white",
                    ha="center",
                    va="center",
                    fontsize=8,
                    clip_on=True,
                )
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)


def _unseen(motion: Motion) -> list[Span]:
    return _runs(motion.times, ~motion.observed)


def _hidden(motion: Motion) -> list[Span]:
    """Return when somebody else covers cells in which the patient usually is."""
    known = motion.coverage != UNKNOWN
    usual = np.where(known, motion.coverage, 0)[motion.observed].mean(0) > 60
    return _runs(motion.times, motion.observed & ((~known & usual).sum(1) > 0.05 * usual.sum()))


def _runs(times: np.ndarray, flags: np.ndarray) -> list[Span]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(int), [0]])))
    step = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
    pairs = zip(edges[::2], edges[1::2] - 1, strict=True)
    return [Span(float(times[a]), float(times[b]) + step, 0.0) for a, b in pairs]
