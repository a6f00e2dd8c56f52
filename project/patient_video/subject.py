"""Which of the people in a video is the patient, and which pieces of tracks belong together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from project.patient_video.tracks import Tracks

Region = tuple[float, float, float, float]

CELLS = (24, 32)  # rows and columns of the map of where people stay
SAME_PATIENT = 0.1  # least IoU of two pieces of class patient (lying and sitting overlap this much)
SAME_PERSON = 0.3  # the same where the model has no such class, and the piece may be a visitor
OTHER_CLASS = 0.5  # the same where the detector calls the second piece something else
MAY_OVERLAP = 0.1  # share of a piece that may lie in time where the patient is already followed


@dataclasses.dataclass(frozen=True)
class Subject:
    """The patient.

    Attributes:
        tracks: identities that the patient had, the longest first.
        rows: (F,) row of ``Tracks`` in each frame, -1 where the patient was not found.
        bed: region that was used, XYXY in pixels; None where the class alone decided.
        reason: how the patient was told from the others, for the report.
    """

    tracks: tuple[int, ...]
    rows: np.ndarray
    bed: Region | None
    reason: str


def estimate_bed(tracks: Tracks) -> Region | None:
    """Return the region where somebody stays the longest, XYXY in pixels; None without people.

    Of a coarse map of how many sightings cover each cell, the cells with at least half of the
    highest count that hang together with its place.
    """
    from scipy.ndimage import label

    if not len(tracks):
        return None
    rows, cols = CELLS
    scale = np.array([cols / tracks.size[1], rows / tracks.size[0]] * 2)
    cells = tracks.box * scale
    x0, y0 = (np.floor(cells[:, i]).astype(int).clip(0, n - 1) for i, n in ((0, cols), (1, rows)))
    x1, y1 = (np.ceil(cells[:, i]).astype(int).clip(1, n) for i, n in ((2, cols), (3, rows)))
    corners = np.zeros((rows + 1, cols + 1))  # the count is the double running sum of the corners
    for y, x, sign in ((y0, x0, 1), (y0, x1, -1), (y1, x0, -1), (y1, x1, 1)):
        np.add.at(corners, (y, x), sign)
    count = corners.cumsum(0).cumsum(1)[:rows, :cols]
    pieces, _ = label(count >= 0.5 * count.max())
    ys, xs = np.nonzero(pieces == pieces[np.unravel_index(count.argmax(), count.shape)])
    low, high = np.array([xs.min(), ys.min()]), np.array([xs.max() + 1, ys.max() + 1])
    return tuple((np.concatenate([low, high]) / scale).tolist())  # type: ignore[return-value]


def choose_subject(
    tracks: Tracks,
    subject: Sequence[int] = (),
    bed: Region | None = None,
    patient_class: str = "patient",
) -> Subject:
    """Find the patient among the people of a video, and join the pieces of the patient's track.

    Args:
        tracks: everybody.
        subject: identities that are the patient; by default the program chooses: of those that the
            detector mostly calls `patient_class`, where it has such a class, else of all, the one
            that is longest (sum of its scores) in the bed.
        bed: region of the bed, XYXY in pixels; estimated where it is needed and not given.
        patient_class: name of the patients' class.

    Returns:
        The patient, of no track where nobody was found.

    Raises:
        ValueError: an identity of `subject` is not in the video, or `bed` is empty.
    """
    if bed is not None and not (bed[0] < bed[2] and bed[1] < bed[3]):
        raise ValueError(f"bed: expected x0 < x1 and y0 < y1 (pixels), got {tuple(bed)}")
    ids = np.unique(tracks.track)
    unknown = set(subject) - set(ids.tolist())
    if unknown:
        raise ValueError(
            f"subject: identity {min(unknown)} is not in the video, which has "
            f"{', '.join(map(str, ids.tolist())) or 'none'}"
        )
    nobody = np.full(len(tracks.frames), -1)
    if not len(ids):
        return Subject((), nobody, bed, "nobody was found in the video")
    classes = {int(i): _class_of(tracks, i) for i in ids}
    patient_ids = {i for i, name in tracks.names.items() if name == patient_class}
    called = [i for i in classes if classes[i] in patient_ids]
    if subject:
        seeds, reason = list(subject), "chosen by --subject"
    else:
        candidates = called or list(classes)
        if not called or bed is not None:
            bed = bed or estimate_bed(tracks)
        weights = {i: _presence(tracks, i, bed) for i in candidates}
        seeds = [max(candidates, key=lambda i: (weights[i], -i))]
        reason = f"longest track of class '{patient_class}'" if called else "longest track"
        reason += " in the bed" if bed else ""
    needed = {
        i: OTHER_CLASS
        if classes[i] not in {classes[s] for s in seeds}
        else SAME_PATIENT
        if classes[i] in patient_ids
        else SAME_PERSON
        for i in classes
    }
    rows = _stitch(tracks, seeds, needed)
    used, counts = np.unique(tracks.track[rows[rows >= 0]], return_counts=True)
    ordered = tuple(int(i) for i in used[np.argsort(-counts, kind="stable")])
    return Subject(ordered, rows, bed, reason)


def _class_of(tracks: Tracks, identity: int) -> int:
    """Return the class that an identity mostly has, by the sum of its scores."""
    own = tracks.track == identity
    kinds = np.unique(tracks.category[own])
    sums = [tracks.score[own & (tracks.category == k)].sum() for k in kinds]
    return int(kinds[int(np.argmax(sums))])


def _presence(tracks: Tracks, identity: int, bed: Region | None) -> float:
    """Return the sum of an identity's scores, each times the share of its box inside the bed."""
    own = tracks.track == identity
    if bed is None:
        return float(tracks.score[own].sum())
    box = tracks.box[own]
    width = np.minimum(box[:, 2], bed[2]) - np.maximum(box[:, 0], bed[0])
    height = np.minimum(box[:, 3], bed[3]) - np.maximum(box[:, 1], bed[1])
    inside = width.clip(0) * height.clip(0) / np.maximum(_area(box), 1e-9)
    return float((tracks.score[own] * inside).sum())


def _area(box: np.ndarray) -> np.ndarray:
    return (box[..., 2] - box[..., 0]) * (box[..., 3] - box[..., 1])


def _stitch(tracks: Tracks, seeds: Sequence[int], needed: dict[int, float]) -> np.ndarray:
    """Return the (F,) rows of the patient: the seeds, and what continues them before and after.

    Longer pieces first; a piece is taken where nearly all of it lies in time outside of what is
    already there, and its box is where the patient was last, or is next, seen.

    Args:
        tracks: everybody.
        seeds: identities that are the patient.
        needed: least IoU with the patient for each identity to be taken.
    """
    position = np.searchsorted(tracks.frames, tracks.frame)
    rows = np.full(len(tracks.frames), -1)

    def add(identity: int) -> None:
        for r in np.flatnonzero(tracks.track == identity):
            here = rows[position[r]]
            if here < 0 or (identity in seeds and tracks.score[r] > tracks.score[here]):
                rows[position[r]] = r

    for identity in seeds:
        add(identity)
    weight = {i: _presence(tracks, i, None) for i in needed if i not in seeds}
    left = sorted(weight, key=lambda i: (-weight[i], i))
    while True:  # a piece may reach the patient only by way of another one
        taken = next((i for i in left if _continues(tracks, i, position, rows) >= needed[i]), None)
        if taken is None:
            return rows
        add(taken)
        left.remove(taken)


def _continues(tracks: Tracks, identity: int, position: np.ndarray, rows: np.ndarray) -> float:
    """Return how well an identity goes on, in place, where the patient's rows leave off in time.

    The lower one of two IoU: of the boxes where the two meet, and of the usual boxes; the posture
    may have changed, so the patient's usual box is that of the seconds around. 0 where the two are
    seen at once.
    """
    own = np.flatnonzero(tracks.track == identity)
    places = position[own]
    if (rows[places] >= 0).mean() > MAY_OVERLAP:
        return 0.0
    known = np.flatnonzero(rows >= 0)
    after = np.searchsorted(known, places)
    before, after = known[(after - 1).clip(0)], known[after.clip(max=len(known) - 1)]
    nearest = np.where(np.abs(before - places) <= np.abs(after - places), before, after)
    k = int(np.abs(nearest - places).argmin())
    meeting = box_iou(tracks.box[own[k]], tracks.box[rows[nearest[k]]])
    around = known[np.abs(known - nearest[k]).argsort(kind="stable")[: len(own)]]
    usual = box_iou(np.median(tracks.box[own], 0), np.median(tracks.box[rows[around]], 0))
    return min(meeting, usual)


def box_iou(a: np.ndarray, b: np.ndarray) -> float:
    """Return the intersection over union of two (4,) XYXY boxes."""
    low, high = np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:])
    common = float(np.prod((high - low).clip(0)))
    union = float(_area(a) + _area(b)) - common
    return common / union if union > 0 else 0.0
