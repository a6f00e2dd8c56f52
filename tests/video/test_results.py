"""The results of a tracking are one set, of one run: privacy, full disks, kills, locks."""

import csv
import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from d2kit.engine.safety.run_lock import RunLock
from d2kit.video import (
    COMPLETE,
    DETECTIONS,
    DetectionWriter,
    FrameDetections,
    Selection,
    VideoOptions,
    track_video,
)
from tests.support.clips import header, quiet, tracking_cfg

SIZE = (80, 64)


@pytest.fixture
def scene(tmp_path):
    """A folder of 8 pictures and the stored detections of what moves in them."""
    pictures, store = tmp_path / "in", tmp_path / "store"
    pictures.mkdir()
    store.mkdir()
    rng = np.random.default_rng(0)
    writer = DetectionWriter(store / DETECTIONS, header(SIZE, classes=["person"], fps=25.0))
    for k in range(8):
        pixels = rng.integers(0, 60, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
        pixels[20:44, 6 + 2 * k : 26 + 2 * k] = (220, 90, 40)
        Image.fromarray(pixels).save(pictures / f"{k:03d}.png")
        box = [[6.0 + 2 * k, 20, 26 + 2 * k, 44]]
        writer.write(FrameDetections(k, k / 25, box, [0.9], [0]))
    writer.close({"frames": 8, "problem": ""})
    return tmp_path


def run(scene, **changes):
    changes = {"detections": scene / "store", "fps": 25.0, **changes}
    return track_video(tracking_cfg(), quiet(scene / "in", scene / "out", **changes))


def files(folder):
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file()
    }


def test_the_summary_lists_every_file_with_its_digest(scene):
    summary = run(scene, keep_frames=True)
    found = files(scene / "out")
    del found["summary.json"]
    assert {name: entry["sha256"] for name, entry in summary["files"].items()} == found
    assert len(found) == 4 + 8
    assert json.loads((scene / "out/summary.json").read_text())["files"] == summary["files"]


@pytest.mark.faults(31, fast=True)
@pytest.mark.parametrize("video", [True, False])
@pytest.mark.parametrize("keep", [True, False])
def test_nothing_of_an_unblurred_run_stays_beside_a_blurred_one(scene, video, keep):
    run(scene, keep_frames=True)
    plain = files(scene / "out")
    summary = run(scene, blur="people", video=video, keep_frames=keep)
    assert summary["status"] == COMPLETE
    now = files(scene / "out")
    pictures = [n for n in plain if n.startswith("frames/") or n == "annotated.mp4"]
    assert not [n for n in pictures if now.get(n) == plain[n]]
    assert ("annotated.mp4" in now, "frames/000000.jpg" in now) == (video, keep)


@pytest.mark.slow
def test_it_is_gone_before_the_first_frame_also_when_killed(scene):
    run(scene, keep_frames=True)
    code = (
        "import os, sys; from pathlib import Path\n"
        "from d2kit.video import VideoOptions, track_video\n"
        "from tests.support.clips import quiet, tracking_cfg\n"
        "scene = Path(sys.argv[1])\n"
        "options = quiet(scene / 'in', scene / 'out', detections=scene / 'store', fps=25.0,\n"
        "                blur='people', keep_frames=True)\n"
        "track_video(tracking_cfg(), options, on_frame=lambda n: os.kill(os.getpid(), 9))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(scene)], check=False)
    assert done.returncode == -9
    assert not [n for n in files(scene / "out") if n[0] != "."]
    assert run(scene, blur="people")["status"] == COMPLETE  # what the killed one left is removed
    assert not [n for n in files(scene / "out") if n[0] == "."]


@pytest.mark.parametrize("name", ["annotated.mp4", "tracks.csv", "frames/000003.jpg"])
def test_files_that_no_tracking_made_stay(scene, name):
    mine = scene / "out" / name
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    with pytest.raises(ValueError, match=name):
        run(scene, blur="people")
    assert files(scene / "out") == {name: hashlib.sha256(b"mine").hexdigest()}


def test_a_result_is_not_read_and_replaced_at_once(scene):
    run(scene, keep_frames=True)
    before = files(scene / "out")
    options = quiet(scene / "out/frames", scene / "out", detections=scene / "store", fps=25.0)
    with pytest.raises(ValueError, match="is a result of an earlier tracking"):
        track_video(tracking_cfg(), options)
    assert files(scene / "out") == before


def test_a_mistake_in_the_options_removes_nothing(scene):
    run(scene)
    before = files(scene / "out")
    with pytest.raises(ValueError, match="--subject"):
        run(scene, blur="bystanders")
    assert files(scene / "out") == before


@pytest.mark.slow
@pytest.mark.parametrize("too_large", ["annotated.mp4", "tracks.json", "frames/000000.jpg"])
def test_a_full_disk_leaves_none_of_the_results(scene, too_large):
    sizes = {n: (scene / "out" / n).stat().st_size for n in run(scene, keep_frames=True)["files"]}
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "import tests.video.test_results as here\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "limit = int(sys.argv[2]); resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))\n"
        "try: here.run(Path(sys.argv[1]), keep_frames=True)\n"
        "except OSError as error: print(error)\n"
    )
    limit = sizes[too_large] - 100
    done = subprocess.run(
        [sys.executable, "-c", code, str(scene), str(limit)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert str(scene / "out") in done.stdout
    assert "bytes are free" in done.stdout
    assert files(scene / "out") == {}


def test_the_folder_of_a_living_run_is_refused(scene):
    """The lock of a training: another process' (by `RunLock`) is neither taken nor removed."""
    (scene / "out").mkdir()
    code = (
        "import sys, time; from pathlib import Path\n"
        "from d2kit.engine.safety.run_lock import RunLock\n"
        "lock = RunLock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(scene / "out")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as holder:
        assert holder.stdout.readline() == "held\n"
        before = files(scene / "out")
        with pytest.raises(BlockingIOError, match=f"process {holder.pid} on"):
            run(scene)
        assert files(scene / "out") == before
        with pytest.raises(BlockingIOError):
            RunLock(scene / "out")
        holder.kill()


FORMULAS = ["=cmd|' /C calc'!A0", "+1+1", "-2+3", "@SUM(A1)", "\t=1", "plain", "two\nlines"]


def test_no_cell_is_a_formula(tmp_path):
    from d2kit.utils.text import from_csv_cell

    writer = DetectionWriter(tmp_path / DETECTIONS, header((160, 64), classes=FORMULAS))
    boxes = [[5.0 + 20 * k, 10, 20 + 20 * k, 30] for k in range(7)]
    for k in range(6):
        writer.write(FrameDetections(k, k / 25, boxes, [0.9] * 7, list(range(7))))
    writer.close({"frames": 6, "problem": ""})
    track_video(tracking_cfg(), quiet("", tmp_path, video=False))
    with (tmp_path / "tracks.csv").open(newline="") as file:
        cells = {row["class_name"] for row in csv.DictReader(file)}
    assert not [cell for cell in cells if cell[0] in "=+-@\t"]
    assert {from_csv_cell(cell) for cell in cells} == set(FORMULAS)


NAN = float("nan")


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        *(({"fps": v}, "--fps") for v in (NAN, 0, -1, float("inf"), 1e9)),
        *(({"crf": v}, "--crf") for v in (-1, 52)),
        *(({"preset": v}, "--preset") for v in ("fastest", "")),
        *(({"batch_size": v}, "--batch-size") for v in (0, -3)),
        *(({"subject": v, "blur": "bystanders"}, "--subject") for v in (0, -1)),
        ({"blur": "all"}, "--blur"),
        ({"blur_classes": ("x",)}, "--blur-class"),
    ],
)
def test_option_values_are_refused_by_name(tmp_path, changes, name):
    with pytest.raises(ValueError, match=name):
        VideoOptions(input="x.mp4", output=tmp_path, **changes)


@pytest.mark.parametrize("values", [{"start": NAN}, {"start": -1.0}, {"end": NAN}, {"end": -2.0}])
def test_times_are_refused_by_name(values):
    with pytest.raises(ValueError, match=f"--{next(iter(values))}"):
        Selection(**values)


@pytest.mark.parametrize("key", ["SCORE_THRESH", "TRACK_IOU_THRESHOLD", "MIN_MATCH_IOU"])
@pytest.mark.parametrize("value", [NAN, -0.1, 1.5])
def test_config_values_are_refused_by_name(scene, key, value):
    options = quiet(scene / "in", scene / "out", detections=scene / "store")
    with pytest.raises(ValueError, match=key):
        track_video(tracking_cfg(**{key: value}), options)
    assert not os.path.lexists(scene / "out")
