"""The patient of a tracked video: ``python -m project.patient_video.analyze --tracks DIR``."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from project.patient_video.compare import compare
from project.patient_video.report import Analysis, write_report
from project.patient_video.shaking import ShakingParams, analyse, find_intervals, resample
from project.patient_video.signals import measure
from project.patient_video.subject import Region, choose_subject
from project.patient_video.tracks import Tracks, read_tracks
from project.patient_video.truth import read_truth


def analyze(
    tracks: Tracks,
    *,
    subject: Sequence[int] = (),
    bed: Region | None = None,
    video: str | Path | None = None,
    params: ShakingParams | None = None,
) -> Analysis:
    """Find the patient, measure the motion, and look for rhythmic shaking.

    Args:
        tracks: everybody in the video.
        subject: identities of the patient; chosen by class and place where it is empty.
        bed: region of the bed, XYXY in pixels; estimated where it is needed.
        video: the video's file, for the motion of limbs inside of the outline.
        params: what counts as shaking.
    """
    p = params or ShakingParams()
    patient = choose_subject(tracks, subject, bed)
    motion = measure(tracks, patient, video)
    signal = resample(motion.times, motion.channels(), motion.observed)
    rhythm = analyse(signal, p)
    return Analysis(patient, motion, rhythm, find_intervals(signal, rhythm, p), p)


def main(arguments: Sequence[str] | None = None) -> None:
    """Analyse one tracked video and print what was found."""
    from d2kit.engine import user_errors

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tracks", type=Path, required=True, help="output of d2kit track")
    parser.add_argument(
        "--output", type=Path, help="folder for the report; default: that of --tracks"
    )
    parser.add_argument(
        "--subject", type=int, nargs="+", default=(), help="identity of the patient"
    )
    parser.add_argument(
        "--bed", type=float, nargs=4, metavar=("X0", "Y0", "X1", "Y1"), help="bed, pixels"
    )
    parser.add_argument(
        "--video", type=Path, help="the tracked video, for limbs inside the outline"
    )
    parser.add_argument("--truth", type=Path, help="tracks/videoNN.json of the synthetic ward")
    for name in ("high", "low", "window"):
        default = getattr(ShakingParams, name)
        parser.add_argument(f"--{name}", type=float, default=default, help=f"default {default}")
    args = parser.parse_args(arguments)
    with user_errors():
        params = dataclasses.replace(
            ShakingParams(), high=args.high, low=args.low, window=args.window
        )
        tracks = read_tracks(args.tracks)
        bed = tuple(args.bed) if args.bed else None
        found = analyze(tracks, subject=args.subject, bed=bed, video=args.video, params=params)
        truth = comparison = None
        if args.truth:
            people, truth = read_truth(args.truth)
            comparison = compare(tracks, found.subject, found.intervals, people, truth)
        out = args.output or args.tracks
        content = write_report(
            found, out, name=args.tracks.name, truth=truth, comparison=comparison
        )
    print(describe(content))
    print(f"Written: {out}/motion.png, motion.csv, intervals.csv, report.json")


def describe(content: dict) -> str:
    """Return the report in a few lines of text."""
    from tabulate import tabulate

    subject = content["subject"]
    ids = ", ".join(map(str, subject["identities"])) or "none"
    lines = [
        f"Patient: identity {ids} ({subject['reason']}); seen in {subject['observed_share']:.1%}"
    ]
    spells = content["shaking"]["intervals"]
    rows = [[f"{s[k]:.2f}" for k in ("start", "end", "frequency", "score")] for s in spells]
    lines.append(
        tabulate(
            rows, ["start s", "end s", "Hz", "score"], tablefmt="github", disable_numparse=True
        )
        if rows
        else "No rhythmic shaking found."
    )
    if "comparison" in content:
        c = content["comparison"]
        true = (
            ", ".join(f"{s['start']:.2f} to {s['end']:.2f} s" for s in content["truth"]) or "none"
        )
        iou = ", ".join(f"{v:.2f}" for v in c["iou"]) or "-"
        rows = [
            ["patient followed with one identity", f"{c['followed']:.1%}"],
            ["identities joined to the patient", c["identities"]],
            ["true shaking", true],
            ["temporal IoU", iou],
            ["false intervals", c["false_intervals"]],
            *([name.upper(), f"{c[name]:.1f}"] for name in ("hota", "idf1", "mota")),
            ["identity switches", c["switches"]],
        ]
        lines.append(tabulate(rows, ["against the truth", ""], tablefmt="github"))
    lines += [f"Note: {note}" for note in content["notes"]]
    return "\n\n".join(lines)


if __name__ == "__main__":
    main()
