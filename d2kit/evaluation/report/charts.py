"""Charts as SVG text, coloured by the page's style sheet, so that light and dark both fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from d2kit.utils.text import html_text

__all__ = ["Series", "bars", "lines"]

WIDTH, HEIGHT = 400, 250
"""Of the drawing, in the units of its text: 12 units high, 10 pixels on a telephone."""
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 12, 38
COLORS = 8
"""Classes ``c0`` ... ``c7`` of the style sheet."""


@dataclass
class Series:
    """A line of a chart: its name and (N,) values of both axes; dashed where it is a reference."""

    name: str
    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray
    dashed: bool = False


def lines(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    title: str,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    y_logarithmic: bool = False,
) -> str:
    """Draw lines with a legend below.

    Args:
        series: at least one, in the order of the colours; values that are not finite are gaps.
        x_label: below the axis.
        y_label: beside the axis.
        title: read by screen readers, and shown on hover.
        x_range: lowest and highest value; None: of the data.
        y_range: as `x_range`.
        y_logarithmic: whether y is drawn on a logarithmic scale (values above 0).
    """
    points = [
        (np.asarray(one.x, np.float64).reshape(-1), np.asarray(one.y, np.float64).reshape(-1))
        for one in series
    ]
    if y_logarithmic:
        points = [(x, np.log10(np.where(y > 0, y, np.nan))) for x, y in points]
    x_low, x_high = x_range or _range([x for x, _ in points])
    y_low, y_high = y_range or _range([y for _, y in points])
    parts = [_axes((x_low, x_high), (y_low, y_high), x_label, y_label, y_logarithmic)]
    for index, (one, (x, y)) in enumerate(zip(series, points, strict=True)):
        across = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        down = HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)
        path, pen = [], "M"
        for a, b in zip(across.tolist(), down.tolist(), strict=True):
            if not (np.isfinite(a) and np.isfinite(b)):
                pen = "M"
                continue
            path.append(f"{pen}{a:.1f} {b:.1f}")
            pen = "L"
        style = "reference" if one.dashed else f"c{index % COLORS}"
        text = html_text(one.name)
        parts.append(f'<path class="line {style}" d="{"".join(path)}"><title>{text}</title></path>')
    return _svg(parts, title) + _legend(series)


def bars(
    names: Sequence[str],
    values: Sequence[float],
    *,
    unit: str,
    title: str,
    notes: Sequence[str] = (),
    highest: float | None = None,
) -> str:
    """Draw horizontal bars with their values.

    Args:
        names: one per bar.
        values: not below 0; nan is drawn as an empty bar.
        unit: behind each value.
        title: read by screen readers.
        notes: a few words behind each value.
        highest: value of a full bar; None: the largest.
    """
    top = highest or max((v for v in values if np.isfinite(v)), default=0) or 1
    rows = []
    for index, (name, value) in enumerate(zip(names, values, strict=True)):
        known = bool(np.isfinite(value))
        share = 100 * min(1.0, value / top) if known else 0
        note = f" <small>{html_text(notes[index])}</small>" if notes else ""
        figure = f"{value:.1f}{unit}" if known else "none"
        rows.append(
            f'<div class="bar"><span>{html_text(name)}</span>'
            f'<span class="track"><i style="width:{share:.1f}%"></i></span>'
            f"<span>{figure}{note}</span></div>"
        )
    label = html_text(title)
    return f'<div class="bars" role="img" aria-label="{label}">{"".join(rows)}</div>'


def _range(values: Sequence[np.ndarray]) -> tuple[float, float]:
    data = np.concatenate([np.zeros(0), *values])
    data = data[np.isfinite(data)]
    if not len(data):
        return 0.0, 1.0
    low, high = float(data.min()), float(data.max())
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _ticks(low: float, high: float) -> list[float]:
    """Return three to six round numbers inside a range."""
    rough = (high - low) / 5
    power = 10.0 ** np.floor(np.log10(rough))
    step = float(power * next(m for m in (1, 2, 5, 10) if power * m >= rough * 0.999))
    first = np.ceil(low / step - 1e-9) * step
    return [float(t) for t in np.arange(first, high + step * 1e-6, step)]


def _axes(
    x: tuple[float, float], y: tuple[float, float], x_label: str, y_label: str, logarithmic: bool
) -> str:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for tick in _ticks(*x):
        at = LEFT + (tick - x[0]) / (x[1] - x[0]) * (right - LEFT)
        parts.append(f'<text x="{at:.1f}" y="{bottom + 16}" class="middle">{_number(tick)}</text>')
    for tick in _ticks(*y):
        at = bottom - (tick - y[0]) / (y[1] - y[0]) * (bottom - TOP)
        value = _number(10**tick if logarithmic else tick)
        parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{right}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" class="end">{value}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{right}"/>')
    middle = (LEFT + right) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" class="middle">{html_text(x_label)}</text>')
    parts.append(
        f'<text transform="translate(11 {(TOP + bottom) / 2}) rotate(-90)" class="middle">'
        f"{html_text(y_label)}</text>"
    )
    return "".join(parts)


def _number(value: float) -> str:
    if abs(value) < 1e-12:
        return "0"
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.3g}"


def _svg(parts: Sequence[str], title: str) -> str:
    label = html_text(title)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><title>{label}</title>'
        f"{''.join(parts)}</svg>"
    )


def _legend(series: Sequence[Series]) -> str:
    if len(series) < 2:
        return ""
    entries = "".join(
        f'<span><i class="{"reference" if s.dashed else f"c{i % COLORS}"}"></i>'
        f"{html_text(s.name)}</span>"
        for i, s in enumerate(series)
    )
    return f'<div class="legend">{entries}</div>'
