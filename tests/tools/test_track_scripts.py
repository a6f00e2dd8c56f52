"""track_video.py and evaluate_tracks.py: a ward video from a model to a metric, exit codes."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from d2kit.video import DETECTIONS, DetectionWriter
from project.patient_video.dataset import WardSpec, write_video
from tests.support import tiny_detector
from tests.support.clips import detections_of, header

REPO = Path(__file__).parents[2]


def script(name):
    spec = importlib.util.spec_from_file_location(f"script_{name}", REPO / f"tools/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def ward(tmp_path_factory):
    """A ward video on disk, its ground truth as COCO-video JSON, detections from it, a config."""
    root = tmp_path_factory.mktemp("ward")
    spec = WardSpec(seconds=4.0, width=160)
    part = write_video(spec, 2, root)
    from project.patient_video.dataset import _coco

    (root / "truth.json").write_text(json.dumps(_coco([part], 1)))
    weights = tiny_detector.save_weights(root / "tiny.pth")
    (root / "config.yaml").write_text(tiny_detector.detector_cfg(weights).dump())
    video, rng = spec.video(2), np.random.default_rng(0)
    (root / "run").mkdir()
    writer = DetectionWriter(root / "run" / DETECTIONS, header(source="video02.mp4"))
    for k in range(len(video)):
        writer.write(detections_of(video.render(k)[1], k, k / spec.fps, rng, miss=0.05))
    writer.close({"frames": len(video)})
    return root


@pytest.fixture
def run_script(monkeypatch):
    """Return a function that runs track_video.py here and gives its exit code."""
    monkeypatch.setattr("signal.signal", lambda *_: None)  # pytest's own handlers stay
    module = script("track_video")
    return lambda *arguments: module.main([str(a) for a in arguments])


def test_from_stored_detections_to_hota(ward, run_script, capsys):
    code = run_script(
        *("--config-file", ward / "config.yaml", "--input", ward / "videos/video02.mp4"),
        *("--output", ward / "run", "--from-detections", "--tracker", "bytetrack"),
        *("TRACKER_HEADS.SCORE_THRESH", "0.3"),
    )
    assert code == 0
    assert "60 frames (0 detected, 60 from the store), 2 identities" in capsys.readouterr().out
    metrics = ward / "metrics.json"
    arguments = ["--ground-truth", ward / "truth.json", "--results", ward / "run"]
    script("evaluate_tracks").main([str(a) for a in [*arguments, "--output", metrics]])
    overall = json.loads(metrics.read_text())["overall"]
    assert overall["IDSW"] == 0
    assert overall["IDF1"] > 93
    assert overall["HOTA"] > 85
    assert "overall" in capsys.readouterr().out


def test_with_a_model(ward, run_script, tmp_path):
    code = run_script(
        *("--config-file", ward / "config.yaml", "--input", ward / "videos/video02.mp4"),
        *("--output", tmp_path, "--tracker", "hungarian", "--stride", 4, "--start", 1, "--end", 3),
        *("--blur", "people", "TRACKER_HEADS.SCORE_THRESH", "0.0"),
    )
    assert code == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["frames_detected"] == 8
    assert summary["blur"] == "people"
    assert summary["selection"] == {"stride": 4, "start": 1.0, "end": 3.0}


def test_exit_code_of_a_damaged_video(ward, run_script, tmp_path, capsys):
    from tests.support.clips import ward_frames
    from tests.support.clips import write_video as encode

    path = tmp_path / "cut.mp4"
    images = [image for image, _ in ward_frames(seconds=2.0)]
    encode(path, images, options={"movflags": "+faststart"})
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 3 // 4])
    code = run_script(
        "--config-file", ward / "config.yaml", "--input", path, "--output", tmp_path / "out"
    )
    assert code == 3
    message = capsys.readouterr().err
    assert "input damaged: it ends after" in message
    assert "of 30 announced frames" in message
    assert (tmp_path / "out/tracks.csv").exists()


def test_mistakes_are_one_line(ward, tmp_path):
    """The real script: a message, exit code 1, nothing written."""
    (tmp_path / "page.mp4").write_text("<html>")
    command = [sys.executable, str(REPO / "tools/track_video.py")]
    command += ["--config-file", str(ward / "config.yaml"), "--output", str(tmp_path / "out")]
    run = subprocess.run(
        [*command, "--input", str(tmp_path / "page.mp4")],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=REPO,
    )
    assert run.returncode == 1
    assert "cannot be read as a video" in run.stderr
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "out").exists()
