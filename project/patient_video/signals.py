"""Motion of one person, frame by frame, from masks (and from the video where it is given)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from project.patient_video.subject import Subject
from project.patient_video.tracks import Rle, Tracks

LEVELS = 250  # coverage of a cell is kept in steps of 1/250, so that an hour is some 40 MB
UNKNOWN = 255


@dataclasses.dataclass(frozen=True)
class Grid:
    """Square cells over the part of the frame where the patient is: upper left corner, pixels."""

    x0: int
    y0: int
    cell: int
    rows: int
    cols: int

    def coverage(self, mask: np.ndarray) -> np.ndarray:
        """Return the (rows, cols) means over the cells of an (H, W) mask or picture, float32."""
        import cv2

        part = np.zeros((self.rows * self.cell, self.cols * self.cell), np.float32)
        inside = mask[self.y0 : self.y0 + len(part), self.x0 : self.x0 + part.shape[1]]
        part[: inside.shape[0], : inside.shape[1]] = inside
        return cv2.resize(part, (self.cols, self.rows), interpolation=cv2.INTER_AREA)


@dataclasses.dataclass(frozen=True)
class Motion:
    """Motion of the patient, F frames, C = rows x cols cells.

    Attributes:
        frames: (F,) frame numbers.
        times: (F,) time stamps, s.
        track: (F,) identity that the tracker gave; -1 where the patient was not found.
        observed: (F,) True where the patient was detected, not filled in.
        box: (F, 4) XYXY; bridged by straight lines where not found (as the next two).
        centroid: (F, 2) x, y of the mask.
        area: (F,) pixels of the mask.
        speed: (F,) of the centroid, pixels per second.
        area_change: (F,) per second, relative to the area.
        mask_change: (F,) pixels that belong to one of two consecutive masks only, relative to their
            mean area, where neither mask is hidden by somebody else; NaN where there are no two.
        coverage: (F, C) uint8, share of each cell that the mask fills in steps of 1 / LEVELS;
            UNKNOWN where the patient was not observed or somebody else is in the way.
        light: (F, C) float32, mean grey value of the cell relative to that of the frame; None
            where no video was given.
        grid: the cells.
    """

    frames: np.ndarray
    times: np.ndarray
    track: np.ndarray
    observed: np.ndarray
    box: np.ndarray
    centroid: np.ndarray
    area: np.ndarray
    speed: np.ndarray
    area_change: np.ndarray
    mask_change: np.ndarray
    coverage: np.ndarray
    light: np.ndarray | None
    grid: Grid

    def channels(self) -> np.ndarray:
        """Return the (F, C') signed signals of which the rhythm is sought, NaN where not known.

        Coverage of the cells (of the grey values, where a video was given) that ever change,
        divided by the root of the number of cells that the patient fills: the root of the sum of
        their mean squares is then the oscillation of a cell of the body.
        """
        known = self.coverage != UNKNOWN
        share = np.where(known, self.coverage, np.float32(np.nan)) / np.float32(LEVELS)
        body = float(np.nanmedian(np.nansum(share[self.observed], axis=1))) if known.any() else 0.0
        if self.light is not None:
            often = np.nan_to_num(share).mean(0) > 0.05
            share = np.where(known, self.light, np.nan)[:, often]
        low, high = _range(share)
        return share[:, high > low] / np.sqrt(max(body, 1.0))


def _range(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return lowest and highest known value of each column, 0 where there is none."""
    if not len(values):
        return np.zeros(values.shape[1]), np.zeros(values.shape[1])
    known = np.isfinite(values)
    low = np.where(known, values, np.inf).min(0)
    high = np.where(known, values, -np.inf).max(0)
    return np.where(known.any(0), low, 0.0), np.where(known.any(0), high, 0.0)


def measure(tracks: Tracks, subject: Subject, video: str | Path | None = None) -> Motion:
    """Measure the motion of the patient.

    Args:
        tracks: everybody: who stands in front of the patient hides motion, and adds none.
        subject: the patient.
        video: the file that was tracked; with it, the grey values inside of the patient's outline
            are the signal, which also shows limbs that move in front of the body.

    Returns:
        The motion; of no cell where the patient was never observed.
    """
    rows = subject.rows
    observed = rows >= 0
    observed[observed] &= ~tracks.interpolated[rows[observed]]
    grid = _grid(tracks, rows[observed])
    count = len(tracks.frames)
    coverage = np.full((count, grid.rows * grid.cols), UNKNOWN, np.uint8)
    centroid, area = np.full((count, 2), np.nan), np.full(count, np.nan)
    change = np.full(count, np.nan)
    before: tuple[np.ndarray, np.ndarray] | None = None
    for k, here in tracks.by_frame():
        if not observed[k]:
            before = None
            continue
        mask = decode_mask(tracks, rows[k])
        hidden = _others(tracks, here[here != rows[k]], grid)
        area[k] = mask.sum()
        centroid[k] = _centroid(mask, tracks.box[rows[k]])
        blocked = _grow(grid.coverage(hidden) > 0)
        share = np.round(grid.coverage(mask) * LEVELS)
        coverage[k] = np.where(blocked, UNKNOWN, share).astype(np.uint8).ravel()
        if before is not None:
            free = ~(hidden | before[1])
            pair = 0.5 * ((mask & free).sum() + (before[0] & free).sum())
            change[k] = ((mask ^ before[0]) & free).sum() / pair if pair else np.nan
        before = (mask, hidden)
    return _assemble(tracks, rows, observed, grid, centroid, area, change, coverage, video)


def _assemble(
    tracks: Tracks,
    rows: np.ndarray,
    observed: np.ndarray,
    grid: Grid,
    centroid: np.ndarray,
    area: np.ndarray,
    change: np.ndarray,
    coverage: np.ndarray,
    video: str | Path | None,
) -> Motion:
    times = tracks.times
    found = rows >= 0
    box = np.full((len(times), 4), np.nan)
    box[found] = tracks.box[rows[found]]
    centroid, area, box = (_bridge(times, values) for values in (centroid, area[:, None], box))
    area = area[:, 0]
    step = np.diff(times, prepend=times[:1])
    step[:1] = np.nan
    speed = np.hypot(*np.diff(centroid, axis=0, prepend=centroid[:1]).T) / step
    area_change = np.diff(area, prepend=area[:1]) / step / np.where(area > 0, area, np.nan)
    return Motion(
        frames=tracks.frames,
        times=times,
        track=np.where(found, tracks.track[rows], -1) if len(tracks) else np.full(len(times), -1),
        observed=observed,
        box=box,
        centroid=centroid,
        area=area,
        speed=speed,
        area_change=area_change,
        mask_change=change,
        coverage=coverage,
        light=None if video is None else _light(video, tracks, grid),
        grid=grid,
    )


def _bridge(times: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Fill the NaN rows of (F, K) values by straight lines, by the nearest value at the ends."""
    known = np.isfinite(values[:, 0])
    if not known.any():
        return values
    columns = [np.interp(times, times[known], column[known]) for column in values.T]
    return np.stack(columns, 1)


def _grid(tracks: Tracks, rows: np.ndarray) -> Grid:
    """Return cells of a tenth of the patient's size over all the places where the patient was."""
    if not len(rows):
        return Grid(0, 0, 1, 0, 0)
    box = tracks.box[rows]
    filled = [_mask_area(tracks, r) for r in rows[:: max(1, len(rows) // 50)]]
    cell = max(2, round(float(np.median(filled)) ** 0.5 / 10))
    x0, y0 = (max(0, int(np.floor(v)) - cell) for v in box[:, :2].min(0))
    height, width = tracks.size
    x1, y1 = np.minimum(np.ceil(box[:, 2:].max(0)).astype(int) + cell, (width, height))
    return Grid(x0, y0, cell, -int((y0 - y1) // cell), -int((x0 - x1) // cell))


def _mask_area(tracks: Tracks, row: int) -> float:
    from pycocotools import mask as mask_util

    mask = tracks.masks[row]
    if mask is None:
        return float(np.prod(tracks.box[row, 2:] - tracks.box[row, :2]))
    return float(mask_util.area(_binary(mask)))


def _binary(mask: Rle) -> Rle:
    """Return an RLE as pycocotools takes it, with bytes."""
    counts = mask["counts"]
    return {**mask, "counts": counts.encode("ascii") if isinstance(counts, str) else counts}


def decode_mask(tracks: Tracks, row: int) -> np.ndarray:
    """Return the (H, W) bool mask of a sighting; its box, filled, where it has no mask."""
    from pycocotools import mask as mask_util

    mask = tracks.masks[row]
    if mask is not None:
        return mask_util.decode(_binary(mask)).astype(bool)
    filled = np.zeros(tracks.size, bool)
    x0, y0, x1, y1 = tracks.box[row].round().astype(int).clip(0)
    filled[y0:y1, x0:x1] = True
    return filled


def _others(tracks: Tracks, rows: np.ndarray, grid: Grid) -> np.ndarray:
    """Return the (H, W) bool union of the people that touch the grid."""
    union = np.zeros(tracks.size, bool)
    right, bottom = grid.x0 + grid.cols * grid.cell, grid.y0 + grid.rows * grid.cell
    for row in rows:
        x0, y0, x1, y1 = tracks.box[row]
        if x0 < right and x1 > grid.x0 and y0 < bottom and y1 > grid.y0:
            union |= decode_mask(tracks, row)
    return union


def _grow(cells: np.ndarray) -> np.ndarray:
    """Return the (rows, cols) cells and their eight neighbours: masks are least sure at a rim."""
    padded = np.pad(cells, 1)
    grown = padded[:-2] | padded[1:-1] | padded[2:]
    return grown[:, :-2] | grown[:, 1:-1] | grown[:, 2:]


def _centroid(mask: np.ndarray, box: np.ndarray) -> tuple[float, float]:
    """Return x and y of the middle of a mask, of the box where it is empty."""
    columns, lines = mask.sum(0), mask.sum(1)
    total = columns.sum()
    if not total:
        return float(box[0] + box[2]) / 2, float(box[1] + box[3]) / 2
    x = (columns * (np.arange(len(columns)) + 0.5)).sum() / total
    y = (lines * (np.arange(len(lines)) + 0.5)).sum() / total
    return float(x), float(y)


def _light(video: str | Path, tracks: Tracks, grid: Grid) -> np.ndarray:
    """Return the (F, C) mean grey value of the cells, relative to that of the whole frame."""
    import cv2

    from d2kit.video import Selection, open_source

    values = np.full((len(tracks.frames), grid.rows * grid.cols), np.nan, np.float32)
    position = {int(frame): k for k, frame in enumerate(tracks.frames)}
    for frame in open_source(str(video), Selection()):
        if not position or frame.index > tracks.frames[-1]:
            break
        if frame.index not in position:
            continue
        grey = cv2.cvtColor(frame.image, cv2.COLOR_BGR2GRAY)
        if grey.shape != tracks.size:
            raise ValueError(
                f"{video}: frames of {grey.shape[1]} x {grey.shape[0]} pixels, but the tracks are "
                f"of {tracks.size[1]} x {tracks.size[0]}: is it the video that was tracked?"
            )
        relative = grid.coverage(grey) / max(float(grey.mean()), 1.0)
        values[position[frame.index]] = relative.ravel()
    return values
