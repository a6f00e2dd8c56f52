"""Gap filling and minimum length on a stream."""

import pytest

from d2kit.tracking import Sighting, TrackSmoother


def seen(track, x):
    return Sighting(track, 0, 0.9, (x, 0.0, x + 10, 20.0), (x + 5, 10.0), area=100, mask=b"m")


def run(presence, **settings):
    """Feed {track: string of 'x' and '.'}; return {track: string}, '-' where filled, and order."""
    smoother = TrackSmoother(**settings)
    length = len(next(iter(presence.values())))
    out, held = [], 0
    for frame in range(length):
        here = [seen(t, 10.0 * frame) for t, line in presence.items() if line[frame] == "x"]
        out += smoother.push(frame, here)
        held = max(held, frame + 1 - len(out))
    out += smoother.flush()
    assert [frame for frame, _ in out] == list(range(length))
    assert held <= smoother.delay
    lines = {track: ["."] * length for track in presence}
    for frame, sightings in out:
        for s in sightings:
            lines[s.track_id][frame] = "-" if s.interpolated else "x"
            assert s.box[0] == pytest.approx(10.0 * frame)  # a straight walk stays straight
            assert s.centroid[0] == pytest.approx(10.0 * frame + 5)
            assert (s.mask is None) is s.interpolated
    return {track: "".join(line) for track, line in lines.items()}


@pytest.mark.parametrize(
    ("line", "settings", "result"),
    [
        ("x.x..x...x", {}, "x.x..x...x"),
        ("x.x..x...x", {"fill_gap": 1}, "x-x..x...x"),
        ("x.x..x...x", {"fill_gap": 2}, "x-x--x...x"),
        ("x.x..x...x", {"fill_gap": 9}, "x-x--x---x"),
        ("..........", {"fill_gap": 3}, ".........."),
        ("xx........", {"min_track_length": 3}, ".........."),
        ("..xxx.....", {"min_track_length": 3}, "..xxx....."),
        (".......xxx", {"min_track_length": 3}, ".......xxx"),
        ("x.x.x.....", {"min_track_length": 3, "fill_gap": 2}, "x-x-x....."),
        # confirmed later than the delay of 3 frames: reported from where it can be
        ("x....x...x", {"min_track_length": 3, "fill_gap": 1}, ".........x"),
    ],
)
def test_one_track(line, settings, result):
    assert run({1: line}, **settings) == {1: result}


def test_tracks_do_not_mix():
    lines = {1: "xx.xxxx", 2: "...x...", 3: "x..x..x"}
    found = run(lines, fill_gap=1, min_track_length=2)
    assert found == {1: "xx-xxxx", 2: ".......", 3: "...x..x"}


def test_empty_stream():
    smoother = TrackSmoother(fill_gap=3, min_track_length=2)
    assert smoother.flush() == []


@pytest.mark.parametrize("settings", [{"fill_gap": -1}, {"min_track_length": 0}])
def test_wrong_settings(settings):
    with pytest.raises(ValueError, match="FILL_GAP"):
        TrackSmoother(**settings)
