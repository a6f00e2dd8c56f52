"""From a video to its tracks: files, trackers, damage, memory."""

import csv
import json
import subprocess
import sys

import av
import numpy as np
import pytest
from pycocotools import mask as mask_util

from d2kit.video import (
    COMPLETE,
    CSV_COLUMNS,
    DAMAGED,
    DETECTIONS,
    TRACKERS,
    Selection,
    track_video,
)
from d2kit.video.overlay import track_color
from tests.support.clips import (
    FPS,
    NAMES,
    SIZE,
    quiet,
    store_truth,
    tracking_cfg,
    ward_frames,
    write_video,
)

FRAMES = ward_frames()  # 4 s; the patient, and staff from 2.3 s on
FILES = ["annotated.mp4", DETECTIONS, "mot.txt", "summary.json", "tracks.csv", "tracks.json"]


def rows(output):
    with open(output / "tracks.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    return write_video(folder / "clip.mp4", [image for image, _ in FRAMES])


@pytest.fixture(scope="module")
def tracked(clip):
    """Return the folder of a finished run."""
    output = clip.parent / "tracked"
    store_truth(output, FRAMES)
    summary = track_video(tracking_cfg(), quiet(clip, output))
    assert summary["status"] == COMPLETE
    return output


def test_files_and_columns(tracked):
    assert sorted(p.name for p in tracked.iterdir()) == FILES
    table = rows(tracked)
    assert tuple(table[0]) == CSV_COLUMNS
    assert (
        *("frame", "time_s", "track_id", "class_id", "class_name", "score", "x0", "y0", "x1"),
        *("y1", "mask_area_px", "centroid_x", "centroid_y", "speed_px_s", "interpolated"),
    ) == CSV_COLUMNS


def test_tracks_are_the_truth(tracked):
    """Detections are truth with noise, so every row must lie on a person of its frame."""
    identity = {}
    table = rows(tracked)
    for row in table:
        people = FRAMES[int(row["frame"])][1]
        assert float(row["time_s"]) == pytest.approx(int(row["frame"]) / FPS, abs=1e-6)
        person = next(p for p in people if NAMES[p.category] == row["class_name"])
        box = [float(row[c]) for c in ("x0", "y0", "x1", "y1")]
        np.testing.assert_allclose(box, person.box, atol=4)
        identity.setdefault(person.identity, set()).add(row["track_id"])
        if row["interpolated"] == "0":
            ys, xs = np.nonzero(person.mask)
            assert int(row["mask_area_px"]) == len(xs)
            assert float(row["centroid_x"]) == pytest.approx(xs.mean() + 0.5, abs=1e-3)
            assert float(row["centroid_y"]) == pytest.approx(ys.mean() + 0.5, abs=1e-3)
        else:
            assert row["mask_area_px"] == ""
    assert {k: len(v) for k, v in identity.items()} == {1: 1, 2: 1}
    patient = [r for r in table if r["class_name"] == "patient"]
    assert len(patient) >= 0.95 * len(FRAMES)


def test_speed_is_path_over_time(tracked):
    before = {}
    for row in rows(tracked):
        centre = np.array([float(row["centroid_x"]), float(row["centroid_y"])])
        if row["track_id"] in before:
            time, last = before[row["track_id"]]
            speed = np.linalg.norm(centre - last) / (float(row["time_s"]) - time)
            assert float(row["speed_px_s"]) == pytest.approx(speed, abs=0.05)
        else:
            assert row["speed_px_s"] == ""
        before[row["track_id"]] = (float(row["time_s"]), centre)


def test_json_and_mot_say_the_same_as_the_table(tracked):
    data = json.loads((tracked / "tracks.json").read_text())
    table = rows(tracked)
    assert {"info", "videos", "categories", "tracks", "annotations"} <= set(data)
    assert len(data["annotations"]) == len(table)
    for row, annotation in zip(table, data["annotations"], strict=True):
        assert annotation["frame"] == int(row["frame"])
        assert annotation["track_id"] == int(row["track_id"])
        assert annotation["category_id"] == int(row["class_id"]) + 1
        assert annotation["bbox"][0] == pytest.approx(float(row["x0"]))
        assert sum(annotation["bbox"][::2]) == pytest.approx(float(row["x1"]), abs=0.011)
        if row["interpolated"] == "0":
            area = mask_util.decode(annotation["segmentation"]).sum()
            assert area == annotation["area"] == int(row["mask_area_px"])
    lines = (tracked / "mot.txt").read_text().splitlines()
    first = lines[0].split(",")
    assert [int(first[0]), int(first[1])] == [int(table[0]["frame"]) + 1, int(table[0]["track_id"])]
    assert len(lines) == len(table)
    assert all(len(line.split(",")) == 10 for line in lines)


def test_summary(tracked):
    summary = json.loads((tracked / "summary.json").read_text())
    assert summary["frames"] == summary["frames_from_store"] == summary["frames_in_source"] == 60
    assert summary["frames_detected"] == 0
    assert summary["identities"] == len(summary["tracks"]) == 2
    counted = sum(t["frames"] + t["interpolated"] for t in summary["tracks"])
    assert counted == len(rows(tracked))
    assert [t["class_name"] for t in summary["tracks"]] == NAMES


def test_annotated_video_has_every_frame_and_the_colours_of_the_identities(tracked):
    with av.open(str(tracked / "annotated.mp4")) as container:
        frames = [f.to_ndarray(format="bgr24") for f in container.decode(video=0)]
    assert len(frames) == 60
    assert frames[0].shape == (SIZE[1], SIZE[0], 3)
    for row in rows(tracked):
        image, original = frames[int(row["frame"])], FRAMES[int(row["frame"])][0]
        if row["interpolated"] == "1":
            continue
        person = next(
            p for p in FRAMES[int(row["frame"])][1] if NAMES[p.category] == row["class_name"]
        )
        change = (image.astype(int) - original)[person.mask].mean(0)
        toward = np.array(track_color(int(row["track_id"]))) - original[person.mask].mean(0)
        assert change @ toward > 0


@pytest.mark.parametrize("short", TRACKERS)
def test_every_tracker_from_the_same_detections(tracked, clip, tmp_path, short):
    cfg = tracking_cfg(TRACKER_NAME=TRACKERS[short], FILL_GAP=3)
    options = quiet(clip, tmp_path, detections=tracked, video=False)
    summary = track_video(cfg, options)
    assert [t["class_name"] for t in summary["tracks"]] == NAMES
    assert summary["tracks"][0]["frames"] >= 50


def test_a_threshold_needs_no_second_detection_pass(tracked, tmp_path):
    options = quiet("", tmp_path, detections=tracked / DETECTIONS, video=False)
    summary = track_video(tracking_cfg(SCORE_THRESH=0.99), options)
    assert summary["identities"] == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *("mot.txt", "summary.json", "tracks.csv", "tracks.json")
    ]
    assert rows(tmp_path) == []
    assert json.loads((tmp_path / "tracks.json").read_text())["annotations"] == []


def test_order_of_stored_detections_does_not_matter(clip, tmp_path):
    found = []
    for seed in (0, 1):  # the seed shuffles; noise and misses are the same in both
        output = tmp_path / str(seed)
        rng = np.random.default_rng(5)
        frames = []
        for image, people in FRAMES:
            order = np.random.default_rng(seed).permutation(len(people))
            frames.append((image, [people[i] for i in order]))
        del rng
        store_truth(output, frames, miss=0.0, seed=7)
        lines = track_video(tracking_cfg(), quiet("", output, video=False))["tracks"]
        found.append([(t["class_name"], t["first_frame"], t["frames"]) for t in lines])
    assert found[0] == found[1]


def test_only_the_kept_frames_are_written(tracked, clip, tmp_path):
    options = quiet(clip, tmp_path, detections=tracked, video=False, keep_frames=True)
    track_video(tracking_cfg(), options)
    assert len(list((tmp_path / "frames").glob("*.jpg"))) == 60
    assert not (tracked / "frames").exists()


# ---------------------------------------------------------------- with a detector


def test_a_video_cut_off_is_tracked_as_far_as_it_goes(tmp_path):
    path = tmp_path / "clip.mp4"
    images = [image for image, _ in FRAMES]
    write_video(path, images, options={"movflags": "+faststart"})
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    output = tmp_path / "out"
    store_truth(output, FRAMES)
    summary = track_video(tracking_cfg(), quiet(path, output))
    assert summary["status"] == DAMAGED
    assert "of 60 announced" in summary["problem"]
    assert 20 < summary["frames"] < 55
    table = rows(output)
    assert max(int(r["frame"]) for r in table) == summary["frames"] - 1
    assert sorted(p.name for p in output.iterdir()) == FILES


def test_stored_detections_cut_off(clip, tmp_path):
    path = store_truth(tmp_path, FRAMES, member=8)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    summary = track_video(tracking_cfg(), quiet(clip, tmp_path))
    assert summary["status"] == DAMAGED
    assert "the stored detections end after" in summary["problem"]


def test_detections_of_another_video(clip, tmp_path):
    store_truth(tmp_path, FRAMES, times=np.arange(60) / 10)
    with pytest.raises(ValueError, match="another video"):
        track_video(tracking_cfg(), quiet(clip, tmp_path))
    other = tmp_path / "other"
    store_truth(other, ward_frames(seconds=1.0, size=(80, 60)), size=(80, 60))
    with pytest.raises(ValueError, match="80x60"):
        track_video(tracking_cfg(), quiet(clip, other))


def test_variable_frame_rate_goes_through(tmp_path):
    times = np.cumsum(np.random.default_rng(0).choice([0.03, 0.08, 0.3], 60)).round(3)
    path = write_video(tmp_path / "clip.mkv", [image for image, _ in FRAMES], times)
    store_truth(tmp_path / "out", FRAMES, times=times)
    track_video(tracking_cfg(), quiet(path, tmp_path / "out"))
    stamps = {int(r["frame"]): float(r["time_s"]) for r in rows(tmp_path / "out")}
    np.testing.assert_allclose(list(stamps.values()), times[list(stamps)], atol=1e-3)
    with av.open(str(tmp_path / "out/annotated.mp4")) as container:
        shown = [f.time for f in container.decode(video=0)]
    np.testing.assert_allclose(shown, times - times[0], atol=2e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "--batch-size"),
        ({"subject": 1}, "--subject"),
        ({"from_detections": False, "input": ""}, "--input"),
        ({"selection": Selection(stride=3)}, "cannot differ"),
    ],
)
def test_wrong_options_are_named(tracked, clip, tmp_path, changes, message):
    settings = {"input": str(clip), **changes}
    with pytest.raises(ValueError, match=message):
        track_video(
            tracking_cfg(), quiet(settings.pop("input"), tmp_path, detections=tracked, **settings)
        )


@pytest.mark.slow
def test_memory_does_not_grow_with_length(tmp_path):
    """The benchmark at reduced length: 1,200 frames against the peak at half of them."""
    command = [sys.executable, "tools/benchmark_video.py", "--frames", "1200"]
    command += ["--folder", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["frames"] == 1200
    assert result["growth"] < 0.05
