"""Files that the analysis of one video leaves: tables for statistics, a report, a picture."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from project.patient_video.compare import Comparison
from project.patient_video.plot import plot_motion
from project.patient_video.shaking import Interval, Rhythm, ShakingParams, Span
from project.patient_video.signals import Motion
from project.patient_video.subject import Subject

MOTION_COLUMNS = (
    *(
        "frame",
        "time_s",
        "track_id",
        "observed",
        "x0",
        "y0",
        "x1",
        "y1",
        "centroid_x",
        "centroid_y",
    ),
    *("area_px", "speed_px_s", "area_change_per_s", "mask_change", "score", "dominant_hz"),
    *("amplitude", "shaking"),
)
INTERVAL_COLUMNS = ("start_s", "end_s", "duration_s", "frequency_hz", "score", "amplitude")


@dataclasses.dataclass(frozen=True)
class Analysis:
    """Everything that was found out about the patient of one video."""

    subject: Subject
    motion: Motion
    rhythm: Rhythm
    intervals: list[Interval]
    params: ShakingParams


def write_report(
    analysis: Analysis,
    folder: str | os.PathLike,
    *,
    name: str = "",
    truth: Sequence[Span] | None = None,
    comparison: Comparison | None = None,
) -> dict:
    """Write ``motion.csv``, ``intervals.csv``, ``report.json`` and ``motion.png``.

    Args:
        analysis: what was found.
        folder: made where it is not there.
        name: of the video, for the headline.
        truth: true spells of shaking, where they are known.
        comparison: found against true, where the truth is known.

    Returns:
        The content of ``report.json``.
    """
    from d2kit.utils.file_io import atomic_write

    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    with atomic_write(out / "motion.csv", "w") as file:
        _table(file, MOTION_COLUMNS, _motion_rows(analysis))
    with atomic_write(out / "intervals.csv", "w") as file:
        _table(file, INTERVAL_COLUMNS, _interval_rows(analysis.intervals))
    content = summary(analysis, truth, comparison)
    with atomic_write(out / "report.json", "w") as file:
        json.dump(content, file, indent=1, allow_nan=False)
    plot_motion(
        analysis.motion,
        analysis.rhythm,
        analysis.intervals,
        out / "motion.png",
        params=analysis.params,
        truth=truth,
        title=_headline(name, content),
    )
    return content


def summary(
    analysis: Analysis,
    truth: Sequence[Span] | None = None,
    comparison: Comparison | None = None,
) -> dict:
    """Return what ``report.json`` holds; numbers that are not known are None."""
    motion, subject = analysis.motion, analysis.subject
    times = motion.times
    rate = 1 / float(np.median(np.diff(times))) if len(times) > 1 else 0.0
    found = motion.track >= 0
    content = {
        "subject": {
            "identities": list(subject.tracks),
            "reason": subject.reason,
            "bed": None if subject.bed is None else [round(v, 1) for v in subject.bed],
            "found_share": _number(found.mean()) if len(found) else 0.0,
            "observed_share": _number(motion.observed.mean()) if len(found) else 0.0,
        },
        "video": {
            "frames": len(times),
            "start_s": _number(times[0]) if len(times) else None,
            "end_s": _number(times[-1]) if len(times) else None,
            "frames_per_second": _number(rate),
            "highest_visible_hz": _number(min(analysis.params.band[1], rate / 2)),
        },
        "shaking": {
            "intervals": [_rounded(dataclasses.asdict(i)) for i in analysis.intervals],
            "total_s": _number(sum(i.end - i.start for i in analysis.intervals)),
        },
        "parameters": {**dataclasses.asdict(analysis.params), "band": list(analysis.params.band)},
        "notes": notes(analysis),
    }
    if truth is not None:
        content["truth"] = [_rounded(dataclasses.asdict(s)) for s in truth]
    if comparison is not None:
        content["comparison"] = _rounded(dataclasses.asdict(comparison))
    return content


def notes(analysis: Analysis) -> list[str]:
    """Return what a reader of the figures must know, in words."""
    motion, p = analysis.motion, analysis.params
    said = []
    if not analysis.subject.tracks:
        return [f"No patient: {analysis.subject.reason}."]
    if len(motion.times) > 1:
        rate = 1 / float(np.median(np.diff(motion.times)))
        if rate / 2 < p.band[1]:
            said.append(
                f"{rate:.1f} frames per second show motion up to {rate / 2:.1f} Hz only; shaking "
                "above is missed, or seen at a wrong frequency. Track every frame (--stride 1)."
            )
        length = float(motion.times[-1] - motion.times[0])
        if length < p.window:
            said.append(
                f"The video is {length:.1f} s long, shorter than a window of {p.window:g} s."
            )
    unseen = 1 - float(motion.observed.mean())
    if unseen > 0.2:
        said.append(f"The patient was not seen in {unseen:.0%} of the frames.")
    return said


def _headline(name: str, content: dict) -> str:
    subject, shaking = content["subject"], content["shaking"]
    if not subject["identities"]:
        return f"{name}: no patient found"
    ids = "+".join(map(str, subject["identities"][:4])) + (
        "+..." if len(subject["identities"]) > 4 else ""
    )
    count = len(shaking["intervals"])
    found = "no shaking" if not count else f"shaking: {count} x, {shaking['total_s']:.1f} s in all"
    start = f"{name}: " if name else ""
    return f"{start}patient = identity {ids}, seen in {subject['observed_share']:.0%}; {found}"


def _motion_rows(analysis: Analysis) -> Iterable[list]:
    motion, rhythm = analysis.motion, analysis.rhythm
    if not len(motion.times):
        return
    if len(rhythm.times):
        window = np.searchsorted(rhythm.times, motion.times).clip(0, len(rhythm.times) - 1)
        before = (window - 1).clip(0)
        nearer = np.abs(rhythm.times[before] - motion.times) < np.abs(
            rhythm.times[window] - motion.times
        )
        window = np.where(nearer, before, window)
    for k, time in enumerate(motion.times):
        seen = len(rhythm.times) > 0
        shaking = any(i.start <= time <= i.end for i in analysis.intervals)
        yield [
            int(motion.frames[k]),
            f"{time:.4f}",
            int(motion.track[k]),
            int(motion.observed[k]),
            *(_cell(v, 2) for v in (*motion.box[k], *motion.centroid[k])),
            _cell(motion.area[k], 0),
            _cell(motion.speed[k], 2),
            _cell(motion.area_change[k], 4),
            _cell(motion.mask_change[k], 4),
            *(
                _cell(values[window[k]], 4) if seen else ""
                for values in (rhythm.score, rhythm.frequency, rhythm.amplitude)
            ),
            int(shaking),
        ]


def _interval_rows(intervals: Sequence[Interval]) -> Iterable[list]:
    for i in intervals:
        values = (i.start, i.end, i.end - i.start, i.frequency, i.score, i.amplitude)
        yield [_cell(v, 3) for v in values]


def _table(file, columns: Sequence[str], rows: Iterable[list]) -> None:  # noqa: ANN001 - text file
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)


def _cell(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else ""


def _number(value: float) -> float | None:
    return round(float(value), 4) if math.isfinite(value) else None


def _rounded(values: dict) -> dict:
    """Return a dict with its floats, and those in its lists, rounded."""
    return {
        k: _number(v)
        if isinstance(v, float)
        else [_number(x) for x in v]
        if isinstance(v, list)
        else v
        for k, v in values.items()
    }
