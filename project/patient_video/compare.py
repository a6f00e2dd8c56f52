"""What was found against what is true: identities, intervals, HOTA and IDF1."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from project.patient_video.shaking import Interval, Span, temporal_iou
from project.patient_video.subject import Subject, box_iou
from project.patient_video.tracks import Tracks

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
        hota: higher-order tracking accuracy of everybody, 0 to 1.
        idf1: F1 of identities of everybody at IoU 0.5, 0 to 1.
        mota: multi-object tracking accuracy of everybody at IoU 0.5, up to 1.
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


def _looked_at(tracks: Tracks, truth: Tracks) -> np.ndarray:
    """Return the numbers of the true frames that the tracker looked at, empty ones included."""
    if len(tracks.frames) < 2:
        return truth.frames
    stride = int(np.median(np.diff(tracks.frames)))
    return truth.frames[(truth.frames - tracks.frames[0]) % stride == 0]


def followed_share(
    tracks: Tracks, subject: Subject, truth: Tracks, patient: int = 1
) -> tuple[float, float]:
    """Return the shares of frames with the patient's main identity, and with any joined one."""
    true_rows = np.flatnonzero(
        (truth.track == patient) & np.isin(truth.frame, _looked_at(tracks, truth))
    )
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
    """Return hota, idf1, mota and switches of everybody, on the frames that were looked at.

    Source: HOTA: Luiten et al., "HOTA: A Higher Order Metric for Evaluating Multi-Object Tracking"
    (2020); IDF1: Ristani et al. (2016); computed by the package trackers.
    """
    from trackers.eval import (
        box_iou as pairwise_iou,
    )
    from trackers.eval import (
        compute_clear_metrics,
        compute_hota_metrics,
        compute_identity_metrics,
    )

    true_ids, ids, similarity = [], [], []
    _, true_index = np.unique(truth.track, return_inverse=True)
    _, index = np.unique(tracks.track, return_inverse=True)
    for frame in _looked_at(tracks, truth):
        a = slice(*np.searchsorted(truth.frame, [frame, frame + 1]))
        b = slice(*np.searchsorted(tracks.frame, [frame, frame + 1]))
        true_ids.append(true_index[a])
        ids.append(index[b])
        similarity.append(pairwise_iou(truth.box[a], tracks.box[b]))
    sequence = (true_ids, ids, similarity)
    clear = compute_clear_metrics(*sequence)
    return {
        "hota": float(compute_hota_metrics(*sequence)["HOTA"]),
        "idf1": float(compute_identity_metrics(*sequence)["IDF1"]),
        "mota": float(clear["MOTA"]),
        "switches": int(clear["IDSW"]),
    }
