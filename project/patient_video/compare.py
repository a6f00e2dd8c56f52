"""What was found against what is true: identities, intervals, HOTA and IDF1."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from project.patient_video.shaking import Interval, Span, temporal_iou
from project.patient_video.subject import Subject, box_iou
from project.patient_video.tracks import Tracks
from project.patient_video.truth import write_mot

SAME_BOX = 0.5  # least IoU of a box with the true one to be on the patient


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Found against true.

    Attributes:
        followed: share of the frames with the patient in view in which the patient has one and the
            same identity of the tracker, on a box of IoU 0.5 or more with the true one.
        followed_joined: the same with all the identities that were joined to the patient.
        identities: number of identities that the patient had, of those joined.
        iou: for each true spell, the best temporal IoU with an interval found.
        false_intervals: found intervals that overlap no true spell by a temporal IoU of 0.1.
        hota: higher-order tracking accuracy of everybody, percent.
        idf1: F1 of identities of everybody at IoU 0.5, percent.
        mota: multi-object tracking accuracy of everybody at IoU 0.5, percent.
        switches: identity switches of everybody.
    """

    followed: float
    followed_joined: float
    identities: int
    iou: list[float]
    false_intervals: int
    hota: float
    idf1: float
    mota: float
    switches: int


def compare(
    tracks: Tracks,
    subject: Subject,
    intervals: Sequence[Interval],
    truth: Tracks,
    spells: Sequence[Span],
    patient: int = 1,
) -> Comparison:
    """Compare tracks, the patient and the intervals found with the truth.

    Args:
        tracks: everybody, as tracked.
        subject: the patient, as found.
        intervals: of shaking, as found.
        truth: everybody, as it was.
        spells: of shaking, as they were.
        patient: true identity of the patient.
    """
    overlaps = [[temporal_iou(i, s) for s in spells] for i in intervals]
    best = [max((row[k] for row in overlaps), default=0.0) for k in range(len(spells))]
    wrong = sum(max(row, default=0.0) < 0.1 for row in overlaps)
    one, joined = followed_share(tracks, subject, truth, patient)
    metrics = tracking_metrics(tracks, truth)
    return Comparison(one, joined, len(subject.tracks), best, wrong, **metrics)


def followed_share(
    tracks: Tracks, subject: Subject, truth: Tracks, patient: int = 1
) -> tuple[float, float]:
    """Return the shares of frames with the patient's main identity, and with any joined one."""
    looked_at = np.isin(truth.frame, tracks.frames)
    true_rows = np.flatnonzero((truth.track == patient) & looked_at)
    found = dict(zip(tracks.frames.tolist(), subject.rows.tolist(), strict=True))
    hits: dict[int, int] = {}
    for true_row in true_rows:
        row = found.get(int(truth.frame[true_row]), -1)
        if row >= 0 and box_iou(tracks.box[row], truth.box[true_row]) >= SAME_BOX:
            identity = int(tracks.track[row])
            hits[identity] = hits.get(identity, 0) + 1
    total = max(1, len(true_rows))
    return max(hits.values(), default=0) / total, sum(hits.values()) / total


def tracking_metrics(tracks: Tracks, truth: Tracks) -> dict[str, float]:
    """Return hota, idf1, mota (percent) and switches of everybody, on the frames looked at."""
    from d2kit.evaluation.track_evaluation import evaluate_tracks

    with tempfile.TemporaryDirectory() as folder:
        wanted, found = Path(folder) / "truth.txt", Path(folder) / "found.txt"
        write_mot(truth.only(np.isin(truth.frame, tracks.frames)), wanted)
        write_mot(tracks, found)
        metrics = evaluate_tracks(wanted, found)["overall"]
    values = {name: float(metrics[name.upper()]) for name in ("hota", "idf1", "mota")}
    return {**values, "switches": int(metrics["IDSW"])}
