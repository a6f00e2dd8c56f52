"""Rhythmic shaking in a motion signal: short-time spectrum, score, intervals.

The signals are *signed* (how much of a grid cell a mask covers), so that a limb that swings f times
a second gives a line at f. Speeds and differences of masks are magnitudes: they rise twice per
swing and would show 2 f, which at the usual frame rates folds back to anywhere.
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class ShakingParams:
    """What counts as rhythmic shaking.

    `high`, `low` and `min_amplitude` were chosen on training videos of the ward alone, exact and
    degraded masks alike (``python -m project.patient_video.calibrate``); no held-out video was
    used.

    Attributes:
        band: lowest and highest frequency of shaking, Hz.
        window: length of the analysis window, s. Longer ones tell noise from rhythm better, shorter
            ones find shorter spells; the ends are found afterwards with `edge_window`.
        hop: step between windows, s.
        floor: motion below this frequency (Hz) is posture and breathing: it is not counted.
        ceiling: highest frequency that is counted, Hz.
        half_width: half of the width of a spectral line, Hz.
        high: score at which an interval begins to count, 0 to 1.
        low: score down to which it lasts.
        min_amplitude: least root mean square of the oscillation at which a window can count, in
            units of the channels.
        min_duration: shorter intervals are dropped, s.
        merge_gap: intervals of one frequency that are closer than this become one, s.
        merge_hz: what "of one frequency" means, Hz.
        edge_window: window with which the ends of an interval are found, s.
        min_observed: share of a window that must have been seen.
    """

    band: tuple[float, float] = (2.0, 6.0)
    window: float = 3.0
    hop: float = 0.1
    floor: float = 1.2
    ceiling: float = 7.2
    half_width: float = 0.6
    high: float = 0.45
    low: float = 0.33
    min_amplitude: float = 0.015
    min_duration: float = 1.5
    merge_gap: float = 1.0
    merge_hz: float = 0.8
    edge_window: float = 1.2
    min_observed: float = 0.5


@dataclasses.dataclass(frozen=True)
class Span:
    """A stretch of time with one rhythm.

    Attributes:
        start: s.
        end: s.
        frequency: dominant frequency, Hz.
    """

    start: float
    end: float
    frequency: float


@dataclasses.dataclass(frozen=True)
class Interval(Span):
    """A spell of shaking that was found.

    Attributes:
        score: mean share of the moving power that lies in the spectral line, 0 to 1.
        amplitude: root mean square of the oscillation, in units of the channels.
    """

    score: float
    amplitude: float


@dataclasses.dataclass(frozen=True)
class Rhythm:
    """Short-time spectrum of a motion signal and what it says, T windows, F frequencies.

    Attributes:
        times: (T,) centres of the windows, s.
        frequencies: (F,) Hz.
        power: (T, F) squared amplitude summed over the channels.
        score: (T,) share of the power between floor and ceiling that lies in the strongest line of
            the band; 0 where the band has no line of its own, NaN where too little was seen.
        frequency: (T,) frequency of that line, Hz; NaN where the score is 0 or NaN.
        amplitude: (T,) root mean square of the oscillation in that line.
        observed: (T,) share of the window that was seen.
    """

    times: np.ndarray
    frequencies: np.ndarray
    power: np.ndarray
    score: np.ndarray
    frequency: np.ndarray
    amplitude: np.ndarray
    observed: np.ndarray


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Channels on an even time base.

    Attributes:
        start: time of the first sample, s.
        rate: samples per second.
        values: (N, C) float32.
        seen: (N,) bool, False where the value bridges a gap.
    """

    start: float
    rate: float
    values: np.ndarray
    seen: np.ndarray

    @property
    def times(self) -> np.ndarray:
        """(N,) time of each sample, s."""
        return self.start + np.arange(len(self.values)) / self.rate


def resample(
    times: np.ndarray, channels: np.ndarray, observed: np.ndarray | None = None
) -> Uniform:
    """Put irregular samples on an even time base, by straight lines between neighbours.

    The rate is the median one of the stamps, so that a steady video keeps its samples. A sample
    counts as seen where observed samples lie within one and a half steps on both sides.

    Args:
        times: (N,) rising stamps, s.
        channels: (N, C) values; NaN where a channel is not known.
        observed: (N,) False where the whole sample is missing; by default all were observed.

    Returns:
        The channels on an even base; those that never were seen are 0.

    Raises:
        ValueError: the stamps do not rise, or the shapes differ.
    """
    times = np.asarray(times, np.float64)
    if channels.ndim != 2 or len(channels) != len(times):
        raise ValueError(
            f"channels: expected ({len(times)}, C), one row per time stamp, got {channels.shape}"
        )
    if (np.diff(times) <= 0).any():
        k = int(np.flatnonzero(np.diff(times) <= 0)[0])
        raise ValueError(
            f"times: expected rising stamps, got {times[k]:.4f} s, then {times[k + 1]:.4f} s"
        )
    keep = np.ones(len(times), bool) if observed is None else np.asarray(observed, bool)
    if keep.sum() < 2:
        return Uniform(0.0, 1.0, np.zeros((0, channels.shape[1]), np.float32), np.zeros(0, bool))
    step = float(np.median(np.diff(times)))
    even = np.arange(times[0], times[-1] + 1e-6, step)
    values = np.zeros((len(even), channels.shape[1]), np.float32)
    for c in range(channels.shape[1]):
        known = keep & np.isfinite(channels[:, c])
        if known.sum() >= 2:
            values[:, c] = np.interp(even, times[known], channels[known, c])
    seen_times = times[keep]
    after = np.searchsorted(seen_times, even - 1e-9).clip(0, len(seen_times) - 1)
    before = (np.searchsorted(seen_times, even + 1e-9) - 1).clip(0)
    far = np.maximum(np.abs(seen_times[after] - even), np.abs(even - seen_times[before]))
    return Uniform(float(times[0]), 1 / step, values, far <= 1.5 * step)


def spectrum(
    signal: Uniform, window: float, hop: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (T,) window centres, (F,) frequencies and the (T, F) power summed over the channels.

    A sinusoid of amplitude a gives a line of height a^2 / 2, its mean square.

    Args:
        signal: N samples of C channels.
        window: length of the Hann window, s.
        hop: step, s; rounded to whole samples.
    """
    from scipy.signal import ShortTimeFFT
    from scipy.signal.windows import hann

    length = max(4, round(window * signal.rate))
    step = max(1, round(hop * signal.rate))
    size = 1 << (4 * length - 1).bit_length()  # finely interpolated: the peak is read off the grid
    changes = np.diff(signal.values, axis=0).any(axis=0)
    moving = signal.values[:, changes].T
    transform = ShortTimeFFT(
        hann(length, sym=False), step, signal.rate, mfft=size, scale_to="magnitude"
    )
    count = len(signal.values) // step + 1
    centres = signal.start + np.arange(count) * step / signal.rate
    power = np.zeros((count, len(transform.f)))
    if moving.size == 0 or moving.shape[1] < length:
        return centres, transform.f, power
    chunk = max(1, int(4e6 / (len(moving) * len(transform.f))))  # some 64 MiB of spectra at a time
    for first in range(0, count, chunk):
        last = min(count, first + chunk)
        z = transform.stft_detrend(moving, "linear", p0=first, p1=last, padding="even", axis=-1)
        power[first:last] = 2 * (z.real**2 + z.imag**2).sum(0).T
    return centres, transform.f, power


def analyse(signal: Uniform, params: ShakingParams | None = None) -> Rhythm:
    """Compute the short-time spectrum of a motion signal, and the score of each window."""
    p = params or ShakingParams()
    times, frequencies, power = spectrum(signal, p.window, p.hop)
    observed = _windowed_mean(signal.seen.astype(np.float64), signal, times, p.window)
    ceiling = min(p.ceiling, signal.rate / 2)
    band = (frequencies >= p.band[0]) & (frequencies <= min(p.band[1], signal.rate / 2))
    score, frequency, amplitude = np.zeros((3, len(times)))
    if band.any() and len(times):
        counted = (frequencies >= p.floor) & (frequencies <= ceiling)
        inside = np.where(band, power, -1.0)
        peak = inside.argmax(1)
        near = np.abs(frequencies[None] - frequencies[peak][:, None]) <= p.half_width
        total = power[:, counted].sum(1)
        share = np.where(near & counted, power, 0).sum(1) / np.maximum(total, 1e-30)
        score = np.where(_is_line(power, peak), share, 0.0)
        frequency = frequencies[peak]
        amplitude = np.sqrt(np.take_along_axis(power, peak[:, None], 1)[:, 0])
    score[observed < p.min_observed] = np.nan
    frequency = np.where(score > 0, frequency, np.nan)
    return Rhythm(times, frequencies, power, score, frequency, amplitude, observed)


def _is_line(power: np.ndarray, peak: np.ndarray) -> np.ndarray:
    """Tell for each window whether the peak of the band is one of the whole spectrum.

    Where the power only falls from lower frequencies, the highest value of the band is its rim.
    """
    rows = np.arange(len(power))
    below = power[rows, np.maximum(peak - 1, 0)]
    above = power[rows, np.minimum(peak + 1, power.shape[1] - 1)]
    here = power[rows, peak]
    return (here > 0) & (here >= below) & (here >= above)


def _windowed_mean(
    values: np.ndarray, signal: Uniform, centres: np.ndarray, window: float
) -> np.ndarray:
    """Return the mean of `values` in a window around each centre."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    middle = np.round((centres - signal.start) * signal.rate).astype(int)
    half = max(1, round(window * signal.rate / 2))
    a, b = (np.clip(middle + side, 0, len(values)) for side in (-half, half))
    return (total[b] - total[a]) / np.maximum(b - a, 1)


def find_intervals(
    signal: Uniform, rhythm: Rhythm, params: ShakingParams | None = None
) -> list[Interval]:
    """Return the spells of shaking, in order of time.

    Windows whose score reaches `high` are kept together with their neighbours above `low`
    (hysteresis); each end is then moved to where the oscillation at the spell's frequency rises
    above, or falls below, half of its usual amplitude; neighbours of one frequency are merged.

    Args:
        signal: what `rhythm` was computed from.
        rhythm: result of `analyse`.
        params: the same as those of `analyse`.
    """
    p = params or ShakingParams()
    score = np.nan_to_num(rhythm.score)
    score[rhythm.amplitude < p.min_amplitude] = 0
    runs = _hysteresis(score, rhythm.frequency, p)
    found = _merge([_interval(run, signal, rhythm, p) for run in runs], p)
    return [i for i in found if i.end - i.start >= p.min_duration]


def _hysteresis(
    score: np.ndarray, frequency: np.ndarray, p: ShakingParams
) -> list[tuple[int, int]]:
    """Return (first, last) of the runs of at least `low` that somewhere reach `high`.

    A jump of the frequency ends a run, and begins another.
    """
    above = np.concatenate([[False], score >= p.low, [False]])
    jumps = np.abs(np.diff(frequency)) > p.merge_hz
    starts = np.flatnonzero(above[1:-1] & ~(above[:-2] & np.concatenate([[True], ~jumps])))
    ends = np.flatnonzero(above[1:-1] & ~(above[2:] & np.concatenate([~jumps, [True]])))
    runs = [(int(a), int(b)) for a, b in zip(starts, ends, strict=True)]
    return [(a, b) for a, b in runs if score[a : b + 1].max() >= p.high]


def _merge(found: list[Interval], p: ShakingParams) -> list[Interval]:
    """Join intervals of one frequency with a short pause or none; let others not overlap."""
    merged: list[Interval] = []
    for interval in sorted(found, key=lambda i: i.start):
        if not merged or interval.start > merged[-1].end + p.merge_gap:
            merged.append(interval)
        elif abs(interval.frequency - merged[-1].frequency) <= p.merge_hz:
            merged[-1] = _union(merged[-1], interval)
        else:
            start = max(interval.start, merged[-1].end)
            merged.append(dataclasses.replace(interval, start=start, end=max(start, interval.end)))
    return merged


def _union(a: Interval, b: Interval) -> Interval:
    """Return one interval of two; frequency, score and amplitude are means over their lengths."""
    lengths = np.array([a.end - a.start, b.end - b.start]) + 1e-9
    means = [
        float(np.average([getattr(a, name), getattr(b, name)], weights=lengths))
        for name in ("frequency", "score", "amplitude")
    ]
    return Interval(a.start, max(a.end, b.end), *means)


def _frequency(run: tuple[int, int], rhythm: Rhythm) -> float:
    """Return the median frequency of a run, weighted towards its clear windows."""
    part = slice(run[0], run[1] + 1)
    score, frequency = np.nan_to_num(rhythm.score[part]), rhythm.frequency[part]
    return float(np.nanmedian(frequency[score >= np.median(score)]))


def _interval(run: tuple[int, int], signal: Uniform, rhythm: Rhythm, p: ShakingParams) -> Interval:
    frequency = _frequency(run, rhythm)
    start, end = rhythm.times[run[0]], rhythm.times[run[1]]
    first = max(0, round((start - p.window - signal.start) * signal.rate))
    last = round((end + p.window - signal.start) * signal.rate) + 1
    part = dataclasses.replace(
        signal,
        start=signal.start + first / signal.rate,
        values=signal.values[first:last],
        seen=signal.seen[first:last],
    )
    times, frequencies, power = spectrum(part, p.edge_window, 0.0)
    near = np.abs(frequencies - frequency) <= p.half_width
    line = np.sqrt(power[:, near].max(1))
    core = (times >= start) & (times <= end)
    usual = float(np.median(line[core])) if core.any() else 0.0
    quiet = float(np.quantile(line[~core], 0.2)) if (~core).any() else 0.0
    strong = line >= quiet + 0.5 * max(0.0, usual - quiet)
    start = _edge(times, strong, start, -1, p.window / 2)
    end = min(_edge(times, strong, end, +1, p.window / 2), float(signal.times[-1]))
    windows = slice(run[0], run[1] + 1)
    score = float(np.nanmean(rhythm.score[windows]))
    return Interval(start, end, frequency, score, usual)


def _edge(
    times: np.ndarray, strong: np.ndarray, rough: float, outwards: int, reach: float
) -> float:
    """Return the time nearest to `rough` at which `strong` begins or ends, within `reach`.

    A window sees a spell from half its length away, so that is how far an end can be off. Further
    inside, a weaker oscillation is a patient who is hidden or shakes less, not the end.
    """
    at = int(np.abs(times - rough).argmin())
    step = outwards if strong[at] else -outwards
    k = at
    while (
        0 <= k + step < len(times)
        and abs(times[k + step] - rough) <= reach
        and strong[k + step] == strong[at]
    ):
        k += step
    if strong[at]:
        return float(times[k])
    inside = 0 <= k + step < len(times) and strong[k + step]
    return float(times[k + step] if inside else rough)


def temporal_iou(a: Span, b: Span) -> float:
    """Return intersection over union of two stretches of time; 0 where both are empty."""
    union = max(a.end, b.end) - min(a.start, b.start)
    return max(0.0, min(a.end, b.end) - max(a.start, b.start)) / union if union > 0 else 0.0
