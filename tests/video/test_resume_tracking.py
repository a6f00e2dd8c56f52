"""Runs over a video that were cut off: resume, kill, interruption, failure, locks."""

import csv
import dataclasses
import subprocess
import sys
import threading

import cv2
import pytest

from d2kit.video import (
    COMPLETE,
    DETECTIONS,
    INTERRUPTED,
    DetectionStore,
    DetectionWriter,
    Selection,
    track_video,
)
from d2kit.video.overlay import Camera
from tests.support import tiny_detector
from tests.support.clips import (
    ward_frames,
    write_video,
)

FRAMES = ward_frames()  # 4 s; the patient, and staff from 2.3 s on
FILES = ["annotated.mp4", DETECTIONS, "mot.txt", "summary.json", "tracks.csv", "tracks.json"]


def rows(output):
    with open(output / "tracks.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return tiny_detector.save_weights(tmp_path_factory.mktemp("weights") / "tiny.pth")


@pytest.fixture(scope="module")
def short_clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("short")
    return write_video(folder / "clip.mp4", [image for image, _ in FRAMES[25:45]])


@pytest.fixture(scope="module")
def undisturbed(short_clip, weights):
    output = short_clip.parent / "undisturbed"
    cfg = tiny_detector.detector_cfg(weights)
    summary = track_video(cfg, tiny_detector.options(short_clip, output))
    assert summary["frames_detected"] == summary["frames"] == 20
    assert summary["identities"] > 2
    return output


def identities(output):
    return (output / "tracks.csv").read_text()


@pytest.mark.parametrize("batch_size", [1, 7])
def test_size_of_batches_changes_no_identity(
    undisturbed, short_clip, weights, tmp_path, batch_size
):
    options = tiny_detector.options(short_clip, tmp_path, batch_size=batch_size, video=False)
    track_video(tiny_detector.detector_cfg(weights), options)
    ours = [(r["frame"], r["track_id"]) for r in rows(tmp_path)]
    assert ours == [(r["frame"], r["track_id"]) for r in rows(undisturbed)]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.95, 1.0])
def test_a_run_goes_on_where_its_detections_end(undisturbed, short_clip, weights, tmp_path, share):
    """What a kill leaves: part of the detections, files with hidden names (FAULTS 32)."""
    whole = DetectionStore(undisturbed / DETECTIONS)
    writer = DetectionWriter(tmp_path / DETECTIONS, whole.header, frames=3)
    for found in whole:
        writer.write(found)
    writer.close(whole.end)
    data = (tmp_path / DETECTIONS).read_bytes()
    (tmp_path / DETECTIONS).write_bytes(data[: int(len(data) * share)])
    (tmp_path / ".tracks.csv.partial").write_text("half a line")
    (tmp_path / ".annotated.mp4.partial").write_bytes(b"half a video")
    summary = track_video(
        tiny_detector.detector_cfg(weights), tiny_detector.options(short_clip, tmp_path)
    )
    assert summary["frames"] == 20
    assert summary["frames_from_store"] + summary["frames_detected"] == 20
    assert summary["frames_from_store"] == {0.0: 0, 0.3: 3, 0.7: 12, 0.95: 18, 1.0: 20}[share]
    assert identities(tmp_path) == identities(undisturbed)
    assert sorted(p.name for p in tmp_path.iterdir()) == FILES


@pytest.mark.faults(32)
@pytest.mark.parametrize("kill_at", [1, 6, 12])
def test_kill_and_resume(undisturbed, short_clip, weights, tmp_path, kill_at):
    command = [sys.executable, "-m", "tests.support.tiny_detector", str(short_clip)]
    command += [str(tmp_path), str(weights)]
    killed = subprocess.run([*command, str(kill_at)], timeout=240, check=False)
    assert killed.returncode == -9
    assert not (tmp_path / "tracks.csv").exists()
    subprocess.run([*command, "0"], timeout=240, check=True)
    assert identities(tmp_path) == identities(undisturbed)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"selection": Selection(stride=2)}, "selection"),
        ({"cfg": ("MODEL.ROI_HEADS.NMS_THRESH_TEST", 0.3)}, "model"),
    ],
)
def test_detections_of_another_run_are_refused(
    undisturbed, short_clip, weights, tmp_path, changes, key
):
    (tmp_path / DETECTIONS).write_bytes((undisturbed / DETECTIONS).read_bytes())
    cfg = tiny_detector.detector_cfg(weights)
    cfg.merge_from_list(list(changes.pop("cfg", ())))
    options = dataclasses.replace(tiny_detector.options(short_clip, tmp_path), **changes)
    with pytest.raises(ValueError, match=key):
        track_video(cfg, options)
    assert [p.name for p in tmp_path.iterdir()] == [DETECTIONS]


def test_other_pictures_of_the_same_name_and_size_are_not_taken_for_the_old_ones(weights, tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    for k, (image, _) in enumerate(FRAMES[25:29]):
        cv2.imwrite(str(folder / f"{k}.bmp"), image)
    cfg = tiny_detector.detector_cfg(weights)
    track_video(cfg, tiny_detector.options(folder, tmp_path / "out"))
    assert track_video(cfg, tiny_detector.options(folder, tmp_path / "out"))["frames_detected"] == 0
    cv2.imwrite(str(folder / "2.bmp"), FRAMES[2][0])
    with pytest.raises(ValueError, match=r"of another run \(content: "):
        track_video(cfg, tiny_detector.options(folder, tmp_path / "out"))


def test_interrupted_and_continued(undisturbed, short_clip, weights, tmp_path):
    stop = threading.Event()
    cfg = tiny_detector.detector_cfg(weights)
    options = tiny_detector.options(short_clip, tmp_path)
    summary = track_video(cfg, options, stop=stop, on_frame=lambda n: n == 3 and stop.set())
    assert summary["status"] == INTERRUPTED
    assert 3 <= summary["frames"] <= 20
    assert len(rows(tmp_path)) > 0
    stop.clear()
    summary = track_video(cfg, options)
    assert summary["status"] == COMPLETE
    assert identities(tmp_path) == identities(undisturbed)


def test_a_failure_keeps_the_detections_and_nothing_half_done(short_clip, weights, tmp_path):
    def fail(count):
        if count == 5:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        track_video(
            tiny_detector.detector_cfg(weights),
            tiny_detector.options(short_clip, tmp_path),
            on_frame=fail,
        )
    assert [p.name for p in tmp_path.iterdir()] == [DETECTIONS]


def test_one_run_at_a_time_in_a_folder(short_clip, weights, tmp_path):
    """A second process is told which one is there, and changes nothing."""
    code = (
        "import sys; from pathlib import Path; from d2kit.engine.safety.run_lock import sole_run\n"
        "with sole_run(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError, match=f"process {holder.pid} on"):
            track_video(
                tiny_detector.detector_cfg(weights), tiny_detector.options(short_clip, tmp_path)
            )
        assert [p.name for p in tmp_path.iterdir()] == [".running"]
        holder.kill()
    options = tiny_detector.options(short_clip, tmp_path, video=False)
    assert track_video(tiny_detector.detector_cfg(weights), options)["status"] == COMPLETE
    assert not (tmp_path / ".running").exists()


# ---------------------------------------------------------------- damaged and odd input


def test_a_recording_of_a_camera_is_not_continued(tmp_path, weights, monkeypatch):
    """OpenCV's capture reads files too, so a file stands for the camera here."""
    clip = write_video(tmp_path / "clip.mp4", [image for image, _ in FRAMES])
    monkeypatch.setattr(
        "d2kit.video.run.open_source", lambda name, selection, fps: Camera(name, selection)
    )
    cfg = tiny_detector.detector_cfg(weights)
    options = tiny_detector.options(clip, tmp_path, selection=Selection(stride=20), video=False)
    summary = track_video(cfg, options)
    assert summary["frames"] == 3
    assert "no picture after 60 frames" in summary["problem"]
    with pytest.raises(ValueError, match="camera"):
        track_video(cfg, options)
    again = dataclasses.replace(options, input="", from_detections=True, selection=Selection())
    assert track_video(cfg, again)["frames_from_store"] == 3
