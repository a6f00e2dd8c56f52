"""Rhythmic shaking in signals of which the rhythm is known."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from project.patient_video.shaking import (
    ShakingParams,
    Span,
    analyse,
    find_intervals,
    resample,
    spectrum,
    temporal_iou,
)

FPS, CELLS = 15.0, 24


def signal(spells=(), *, seconds=20.0, fps=FPS, noise=0.05, seed=0, times=None):
    """Return times and (N, 24) channels: each spell is (start, end, Hz) with its own phases."""
    rng = np.random.default_rng(seed)
    times = np.arange(0, seconds, 1 / fps) if times is None else times
    values = noise * rng.standard_normal((len(times), CELLS))
    values += 0.3 * np.sin(2 * np.pi * 0.2 * times)[:, None] * rng.normal(size=CELLS)  # breathing
    for start, end, frequency in spells:
        inside = (times >= start) & (times <= end)
        weight = rng.uniform(0.1, 0.3, CELLS)
        phase = rng.uniform(-0.5, 0.5, CELLS)
        swing = np.sin(2 * np.pi * frequency * times[:, None] + phase)
        values += weight * swing * inside[:, None]
    return times, values


def found(times, values, observed=None, **changes):
    params = dataclasses.replace(ShakingParams(), **changes)
    even = resample(times, values, observed)
    return find_intervals(even, analyse(even, params), params)


@settings(max_examples=15, deadline=None)
@given(
    frequency=st.floats(2.1, 5.9),
    start=st.floats(1.0, 9.0),
    length=st.floats(4.0, 8.0),
    seed=st.integers(0, 1000),
)
def test_a_tone_is_found_with_its_times_and_frequency(frequency, start, length, seed):
    (interval,) = found(*signal([(start, start + length, frequency)], seed=seed))
    assert interval.frequency == pytest.approx(frequency, abs=0.15)
    assert temporal_iou(interval, Span(start, start + length, frequency)) > 0.85


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), noise=st.floats(0.01, 0.5))
def test_noise_is_not_shaking(seed, noise):
    assert found(*signal(noise=noise, seed=seed)) == []


@pytest.mark.parametrize("frequency", [0.3, 0.8, 1.4, 6.8])
def test_other_rhythms_are_not_shaking(frequency):
    """Breathing, turning, the gait of somebody who walks, and what is faster than shaking."""
    assert found(*signal([(3.0, 15.0, frequency)], fps=30.0)) == []


def test_turning_in_bed_is_not_shaking():
    times, values = signal(noise=0.02)
    turn = np.clip((times - 8) / 2, 0, 1)
    values += (turn * turn * (3 - 2 * turn))[:, None] * np.linspace(-1, 1, CELLS)
    assert found(times, values) == []


def test_a_speed_would_double_the_frequency():
    """Why the signals are signed: a rectified swing has its line at twice the frequency."""
    times, values = signal([(0.0, 20.0, 2.5)], noise=0.0, fps=30.0)
    swing = resample(times, values[:, :1])
    speed = resample(times, np.abs(np.gradient(values[:, :1], axis=0)))
    assert np.nanmedian(analyse(swing).frequency) == pytest.approx(2.5, abs=0.1)
    assert np.nanmedian(analyse(speed).frequency) == pytest.approx(5.0, abs=0.1)


@pytest.mark.parametrize(
    "spells",
    [
        [],
        [(5.0, 11.0, 3.0)],
        [(2.0, 8.0, 3.0), (14.0, 22.0, 4.6)],
        [(2.0, 7.0, 2.4), (10.0, 15.0, 5.2), (20.0, 27.0, 3.3)],
        [(0.0, 6.0, 4.0), (24.0, 30.0, 4.0)],
    ],
)
def test_zero_one_and_many_spells(spells):
    intervals = found(*signal(spells, seconds=30.0))
    assert len(intervals) == len(spells)
    for interval, spell in zip(intervals, spells, strict=True):
        assert temporal_iou(interval, Span(*spell)) > 0.8
        assert interval.frequency == pytest.approx(spell[2], abs=0.15)
        assert 0.45 < interval.score <= 1


def test_a_pause_is_bridged_only_at_one_frequency():
    one = found(*signal([(4.0, 8.0, 3.0), (8.6, 13.0, 3.0)], noise=0.01))
    assert len(one) == 1
    assert temporal_iou(one[0], Span(4.0, 13.0, 3.0)) > 0.9
    two = found(*signal([(4.0, 8.0, 2.4), (8.2, 13.0, 5.4)], noise=0.01))
    assert [round(i.frequency, 1) for i in two] == [2.4, 5.4]


def test_uneven_time_stamps():
    """A variable frame rate: what counts is the stamps, not the numbers of the frames."""
    rng = np.random.default_rng(3)
    steps = rng.uniform(0.6, 1.4, 400) / 20.0
    times = np.cumsum(steps)
    (interval,) = found(*signal([(6.0, 12.0, 4.0)], times=times))
    assert interval.frequency == pytest.approx(4.0, abs=0.15)
    assert temporal_iou(interval, Span(6.0, 12.0, 4.0)) > 0.85


def test_a_change_of_the_frame_rate():
    times = np.concatenate([np.arange(0, 10, 1 / 15), np.arange(10, 20, 1 / 30)])
    (interval,) = found(*signal([(7.0, 14.0, 3.6)], times=times))
    assert interval.frequency == pytest.approx(3.6, abs=0.15)
    assert temporal_iou(interval, Span(7.0, 14.0, 3.6)) > 0.85


@pytest.mark.parametrize("share", [0.05, 0.15])
def test_missed_frames_are_bridged(share):
    times, values = signal([(6.0, 13.0, 3.0)])
    observed = np.random.default_rng(0).random(len(times)) >= share
    values[~observed] = np.nan
    (interval,) = found(times, values, observed)
    assert temporal_iou(interval, Span(6.0, 13.0, 3.0)) > 0.85


def test_a_long_gap_is_marked_and_not_judged():
    times, values = signal([(2.0, 18.0, 3.0)])
    observed = (times < 6) | (times > 14)
    even = resample(times, values, observed)
    assert even.seen.mean() == pytest.approx(0.6, abs=0.03)
    rhythm = analyse(even)
    middle = np.abs(rhythm.times - 10) < 2
    assert np.isnan(rhythm.score[middle]).all()
    assert len(find_intervals(even, rhythm)) == 2


def test_the_power_of_a_line_is_its_mean_square():
    times = np.arange(0, 12, 1 / 30)
    even = resample(times, 0.4 * np.sin(2 * np.pi * 3 * times)[:, None])
    centres, frequencies, power = spectrum(even, 3.0, 0.1)
    middle = power[np.abs(centres - 6) < 2]
    assert frequencies[middle.mean(0).argmax()] == pytest.approx(3.0, abs=0.1)
    assert middle.max() == pytest.approx(0.4**2 / 2, rel=0.02)


def test_the_spectrum_does_not_depend_on_how_it_is_cut(monkeypatch):
    times, values = signal([(5.0, 11.0, 3.0)])
    even = resample(times, values)
    whole = spectrum(even, 3.0, 0.1)[2]
    many = dataclasses.replace(even, values=np.tile(even.values, (1, 100)))
    np.testing.assert_allclose(spectrum(many, 3.0, 0.1)[2], 100 * whole, rtol=1e-4)


@pytest.mark.parametrize("count", [0, 1, 2, 10])
def test_too_short_to_say(count):
    times, values = signal([(0.0, 20.0, 3.0)])
    assert found(times[:count], values[:count]) == []


def test_nothing_observed():
    times, values = signal([(0.0, 20.0, 3.0)])
    assert found(times, values, np.zeros(len(times), bool)) == []
    assert found(times, values[:, :0]) == []


def test_faint_rhythm_does_not_count():
    times, values = signal([(4.0, 14.0, 3.0)], noise=0.0)
    fast = values - values.mean(0)
    assert found(times, fast)
    assert found(times, 1e-3 * fast) == []


@pytest.mark.parametrize(
    ("times", "channels", "message"),
    [
        (np.array([0.0, 0.1, 0.1]), np.zeros((3, 1)), "0.1000 s, then 0.1000 s"),
        (np.array([0.0, 0.1]), np.zeros((3, 1)), r"expected \(2, C\)"),
        (np.array([0.0, 0.1]), np.zeros(2), r"expected \(2, C\)"),
    ],
)
def test_bad_input_is_named(times, channels, message):
    with pytest.raises(ValueError, match=message):
        resample(times, channels)


@pytest.mark.parametrize(
    ("a", "b", "iou"),
    [
        ((0, 2), (1, 3), 1 / 3),
        ((0, 1), (2, 3), 0.0),
        ((0, 4), (1, 3), 0.5),
        ((1, 1), (1, 1), 0.0),
        ((2, 5), (2, 5), 1.0),
    ],
)
def test_temporal_iou(a, b, iou):
    assert temporal_iou(Span(*a, 3.0), Span(*b, 3.0)) == pytest.approx(iou)
