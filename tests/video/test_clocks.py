"""Forty clips: container x clock x start x edit list x aspect x rotation, through a whole run."""

import csv
import json
from fractions import Fraction

import av
import numpy as np
import pytest

from d2kit.video import (
    COMPLETE,
    DETECTIONS,
    DetectionWriter,
    FrameDetections,
    Selection,
    open_source,
    track_video,
)
from tests.support.clips import header, quiet, tracking_cfg

WIDTH, HEIGHT = 64, 48
EVEN = [k / 25 for k in range(12)]
UNEVEN = [0.0, 0.04, 0.2, 0.24, 0.5, 0.54, 0.58, 1.0, 1.04, 1.6, 1.64, 1.72]
HOURLY = [3600.0 * k for k in range(6)]
CLOCKS = {"even": EVEN, "uneven": UNEVEN, "hourly": HOURLY}


def clip(suffix, clock, start=0.0, *, aspect="1", rotation=0):
    return suffix, clock, start, aspect, rotation


# Times below 0 are hidden by an edit list in MP4 and MOV.
CLIPS = [clip("mp4", c, s) for c in CLOCKS for s in (0.0, 10.0, -0.2, 95001.0)]
CLIPS += [clip("mov", c, s) for c in ("even", "uneven") for s in (0.0, 10.0, -0.2)]
CLIPS += [clip("mkv", c, s) for c in CLOCKS for s in (0.0, 10.0, 95001.0)]
CLIPS += [clip("ts", "even", s) for s in (1.4, 10.0, 95001.0)]
CLIPS += [clip("avi", "even"), clip("joined.ts", "even", 0.4), clip("joined.ts", "even", 95001.0)]
CLIPS += [clip("mp4", "even", rotation=r) for r in (90, 180, 270)]
CLIPS += [clip(s, "even", aspect=a) for s in ("mp4", "mkv") for a in ("16/11", "8/9")]
CLIPS += [clip("mp4", "uneven", 10.0, aspect="16/11", rotation=90)]
FAST = CLIPS[1::6]


def write_clip(path, times, start, aspect, rotation):
    """Write frames with a square that moves down."""
    ticks = {".mkv": 1000, ".ts": 25, ".avi": 25}.get(path.suffix, 90_000)
    codec = {".ts": "mpeg2video", ".avi": "mpeg4"}.get(path.suffix, "libx264")
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.time_base = Fraction(1, ticks)
        stream.codec_context.sample_aspect_ratio = Fraction(aspect)
        stream.sample_aspect_ratio = Fraction(aspect)
        if rotation:
            stream.set_display_rotation(rotation)
        for k, moment in enumerate(times):
            image = np.full((HEIGHT, WIDTH, 3), 40, np.uint8)
            image[4 + 2 * k : 14 + 2 * k, 20:30] = 220
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = round((moment + start) * ticks), Fraction(1, ticks)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


def looks(path):
    """Return what a player sees of a file: times, duration, width over height."""
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        times = [float(frame.pts * frame.time_base) for frame in file.decode(stream)]
        duration = stream.duration and float(stream.duration * stream.time_base)
        return (
            times,
            duration,
            stream.width / stream.height * float(stream.sample_aspect_ratio or 1),
        )


@pytest.mark.parametrize(
    ("suffix", "clock", "start", "aspect", "rotation"),
    [pytest.param(*c, marks=[] if c in FAST else pytest.mark.slow) for c in CLIPS],
)
def test_times_durations_and_shapes_are_the_containers(
    tmp_path, suffix, clock, start, aspect, rotation
):
    path = tmp_path / f"clip.{suffix}"
    write_clip(path, CLOCKS[clock], start, aspect, rotation)
    if suffix == "joined.ts":
        path.write_bytes(path.read_bytes() * 2)
    times, _, shape = looks(path)
    if suffix == "joined.ts":  # the second half follows the first at its own pace
        assert len(times) == 24
        assert times[12] < times[11]
        times = [times[0] + k / 25 for k in range(24)]
    source = open_source(str(path), Selection())
    size = source.info.height, source.info.width
    out = tmp_path / "out"
    out.mkdir()
    with_size = header((size[1], size[0]), fps=source.info.fps, classes=["a"])
    writer = DetectionWriter(out / DETECTIONS, with_size)
    for frame in source:
        box = [[20.0, 4 + frame.index, 30, 16 + frame.index]]
        writer.write(FrameDetections(frame.index, frame.time, box, [0.9], [0]))
    writer.close({"frames": source.seen, "problem": ""})

    summary = track_video(tracking_cfg(), quiet(path, out))

    assert (summary["status"], summary["problem"]) == (COMPLETE, "")
    assert summary["frames"] == len(times) == summary["frames_in_source"]
    with (out / "tracks.csv").open() as file:
        found = {int(row["frame"]): float(row["time_s"]) for row in csv.DictReader(file)}
    assert len(found) >= len(times) - 2  # the tracker's first look at it
    assert all(times[k] == pytest.approx(moment, abs=1e-6) for k, moment in found.items())
    drawn, duration, drawn_shape = looks(out / "annotated.mp4")
    assert np.diff(drawn) == pytest.approx(np.diff(times), abs=2e-3)
    last = times[-1] - times[-2]
    assert duration == pytest.approx(times[-1] - times[0] + last, abs=last)
    shown = 1 / shape if rotation % 180 else shape
    assert drawn_shape == pytest.approx(shown, rel=0.02)


def test_speeds_have_one_unit(tmp_path):
    """11 pixels across are as far as 16 down where pixels are 16:11; also without the video."""
    size = (320, 240)
    writer = DetectionWriter(
        tmp_path / DETECTIONS, header(size, classes=["a", "b"], aspect=16 / 11)
    )
    for k in range(12):
        boxes = [[20 + 11 * k, 10, 60 + 11 * k, 50], [250, 20 + 16 * k, 290, 60 + 16 * k]]
        writer.write(FrameDetections(k, k / 25, boxes, [0.9, 0.9], [0, 1]))
    writer.close({"frames": 12, "problem": ""})
    summary = track_video(tracking_cfg(), quiet("", tmp_path, video=False))
    assert summary["sample_aspect_ratio"] == pytest.approx(16 / 11)
    with (tmp_path / "tracks.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["speed_px_s"]]
    for name in ("a", "b"):
        speeds = [float(row["speed_px_s"]) for row in rows if row["class_name"] == name]
        assert np.median(speeds) == pytest.approx(400, rel=0.01)
    video = json.loads((tmp_path / "tracks.json").read_text())["videos"][0]
    assert video["sample_aspect_ratio"] == pytest.approx(16 / 11)


NAMES = ["10:15:00.mp4", "100%d.mp4", "a b#c?.mp4", "-x.mp4", "人.mp4", "7.mp4", "new\nline.mp4"]


@pytest.mark.parametrize("name", [*NAMES, b"caf\xe9.mp4"])
def test_odd_names_are_files(tmp_path, monkeypatch, name):
    write_clip(tmp_path / "clip.mp4", EVEN, 0.0, "1", 0)
    if isinstance(name, bytes):
        name = name.decode("utf-8", "surrogateescape")
    (tmp_path / "clip.mp4").rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    source = open_source(name, Selection())
    assert len(list(source)) == 12
    assert not source.problem
    folder = tmp_path / "2024"  # a folder of digits is no camera
    folder.mkdir()
    with pytest.raises(ValueError, match="no picture"):
        open_source("2024", Selection())


def test_the_default_stream_is_read(tmp_path):
    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as file:
        streams = []
        for width in (32, 64):
            stream = file.add_stream("libx264", rate=25)
            stream.width, stream.height, stream.pix_fmt = width, 48, "yuv420p"
            streams.append(stream)
        streams[0].disposition = av.stream.Disposition(0)
        streams[1].disposition = av.stream.Disposition.default
        for k in range(5):
            for stream in streams:
                image = np.full((48, stream.width, 3), 90, np.uint8)
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                frame.pts, frame.time_base = k, Fraction(1, 25)
                file.mux(stream.encode(frame))
        for stream in streams:
            file.mux(stream.encode())
    assert open_source(str(path), Selection()).info.width == 64


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"start": 5.0, "end": 6.0}, r"from 95001\.000 s"),
        ({"start": 95009.0}, r"its 12 frames go from 95001\.000 s to 95001\.440 s"),
    ],
)
def test_messages_name_the_range_of_the_file(tmp_path, selection, message):
    path = tmp_path / "clip.ts"
    write_clip(path, EVEN, 95001.0, "1", 0)
    with pytest.raises(ValueError, match=message):
        list(open_source(str(path), Selection(**selection)))


def test_selection_behind_a_joint(tmp_path):
    """--start counts on the clock that rises over the joint, by the number of the frame too."""
    path = tmp_path / "joined.ts"
    write_clip(path, EVEN, 0.4, "1", 0)
    path.write_bytes(path.read_bytes() * 2)
    whole = list(open_source(str(path), Selection()))
    part = list(open_source(str(path), Selection(start=0.95)))
    assert [(f.index, f.time) for f in part] == [(f.index, f.time) for f in whole[14:]]
    assert all(np.array_equal(a.image, b.image) for a, b in zip(part, whole[14:], strict=True))
