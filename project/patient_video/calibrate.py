"""Choose the thresholds of shaking: ``python -m project.patient_video.calibrate``.

On training videos: held-out ones, those from ``WardSpec.train_videos`` on, are refused.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from project.patient_video.dataset import WardSpec
from project.patient_video.degrade import Detector, degrade
from project.patient_video.shaking import (
    Rhythm,
    ShakingParams,
    Span,
    Uniform,
    analyse,
    find_intervals,
    resample,
    temporal_iou,
)
from project.patient_video.signals import measure
from project.patient_video.subject import choose_subject
from project.patient_video.truth import spans, ward_truth

DETECTORS: dict[str, Detector | None] = {
    "exact": None,
    "good": Detector(),
    "poor": Detector(jitter=4.0, noise=0.3, miss=0.1),
}
Case = tuple[str, Uniform, Rhythm, list[Span]]


def cases(
    videos: Sequence[int], spec: WardSpec, params: ShakingParams, shaking: bool = True
) -> Iterator[Case]:
    """Yield (detector, signal, rhythm, true spells) of each training video and each detector.

    Args:
        videos: indices.
        spec: the ward.
        params: of the spectrum.
        shaking: False: the patient moves as before, but does not shake.

    Raises:
        ValueError: a video is held out.
    """
    from tqdm import tqdm

    held_out = [i for i in videos if i >= spec.train_videos]
    if held_out:
        raise ValueError(f"videos {held_out} are held out; train: below {spec.train_videos}")
    for index in tqdm(videos, desc="measuring training videos", unit="video"):
        video = spec.video(index)
        if not shaking:
            video.patient = dataclasses.replace(video.patient, spells=())
        exact = ward_truth(video)
        for name, detector in DETECTORS.items():
            tracks = exact if detector is None else degrade(exact, detector, seed=index)
            motion = measure(tracks, choose_subject(tracks))
            signal = resample(motion.times, motion.channels(), motion.observed)
            yield name, signal, analyse(signal, params), spans(video.shaking())


def score(
    found: Sequence[Case], params: ShakingParams
) -> dict[str, tuple[float, float, float, int]]:
    """Return for each detector: mean IoU, lowest IoU, share of IoU 0.7, false intervals."""
    best: dict[str, list[float]] = {name: [] for name, *_ in found}
    false = dict.fromkeys(best, 0)
    for name, signal, rhythm, spells in found:
        intervals = find_intervals(signal, rhythm, params)
        overlaps = np.array([[temporal_iou(i, s) for s in spells] for i in intervals])
        overlaps = overlaps.reshape(len(intervals), len(spells))
        best[name] += overlaps.max(0, initial=0.0).tolist()
        false[name] += int((overlaps.max(1, initial=0.0) < 0.1).sum())
    result = {}
    for name, values in best.items():
        iou = np.array(values or [np.nan])
        result[name] = (iou.mean(), iou.min(), (iou >= 0.7).mean(), false[name])
    return result


def check(seed: int, videos: int) -> str:
    """Return a table of how the thresholds do on rooms and patients of another seed.

    Half of the videos have shaking; in the other half the patient does not shake.
    """
    from tabulate import tabulate

    spec, params = WardSpec(seed=seed), ShakingParams()
    shaking = score(list(cases(range(videos), spec, params)), params)
    still = score(list(cases(range(videos, 2 * videos), spec, params, shaking=False)), params)
    rows = [[name, *shaking[name], still[name][3]] for name in DETECTORS]
    heads = ["detector", "mean IoU", "lowest", "share >= 0.7", "false", "false without shaking"]
    return tabulate(rows, heads, floatfmt=".2f", tablefmt="github")


def main() -> None:
    """Print the best settings of a grid: mean IoU less a tenth per wrong interval and video."""
    from tabulate import tabulate

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--videos", type=int, default=16, help="training videos (default 16)")
    parser.add_argument("--window", type=float, default=ShakingParams.window, help="seconds")
    parser.add_argument("--check", type=int, metavar="SEED", help="how they do on another seed")
    args = parser.parse_args()
    if args.check is not None:
        print(check(args.check, args.videos))
        return
    base = ShakingParams(window=args.window)
    found = list(cases(range(args.videos), WardSpec(), base))
    rows = []
    grid = itertools.product((0.45, 0.5, 0.55), (0.28, 0.33, 0.38), (0.0, 0.015, 0.03))
    for high, low, amplitude in grid:
        params = dataclasses.replace(base, high=high, low=low, min_amplitude=amplitude)
        result = score(found, params)
        value = np.mean([iou - 0.1 * wrong / args.videos for iou, _, _, wrong in result.values()])
        cells = [
            f"{iou:.3f} {least:.2f} {share:.2f} {wrong}"
            for iou, least, share, wrong in result.values()
        ]
        rows.append([value, high, low, amplitude, *cells])
    rows.sort(key=lambda row: -row[0])
    heads = [f"{name}: mean IoU, lowest, share >= 0.7, wrong" for name in DETECTORS]
    print(tabulate(rows[:15], ["value", "high", "low", "amplitude", *heads], floatfmt=".3f"))


if __name__ == "__main__":
    main()
