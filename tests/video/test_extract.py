"""Frames of videos as pictures."""

import json

import cv2
import numpy as np
import pytest

from d2kit.data.records import group_images
from d2kit.video.sources import extract_frames
from tests.support.clips import ward_frames, write_video

IMAGES = [image for image, _ in ward_frames(seconds=2.0)]  # 30 frames at 15 per second


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    uneven = np.cumsum([0.02, 0.4, 0.05] * 10).round(3)
    return [write_video(folder / "a.mp4", IMAGES), write_video(folder / "b.mkv", IMAGES, uneven)]


def test_every_nth_frame_of_several_videos(clips, tmp_path):
    found = extract_frames(clips, tmp_path, every=10)
    assert found == json.loads((tmp_path / "frames.json").read_text())
    assert [v["name"] for v in found["videos"]] == ["a", "b"]
    assert [im["frame_id"] for im in found["images"]] == [0, 10, 20] * 2
    assert len({im["id"] for im in found["images"]}) == 6
    assert {k: len(v) for k, v in group_images(found).items()} == {"a": 3, "b": 3}
    picture = cv2.imread(str(tmp_path / found["images"][1]["file_name"]))
    assert np.abs(picture.astype(int) - IMAGES[10]).mean() < 12
    assert found["images"][1]["time"] == pytest.approx(10 / 15, abs=1e-3)


def test_pictures_per_second_go_by_the_time_stamps(clips, tmp_path):
    found = extract_frames(clips, tmp_path, fps=2)
    times = {v: [im["time"] for im in found["images"] if im["video_id"] == v] for v in (1, 2)}
    assert len(times[1]) == 4
    assert np.diff(times[1]) == pytest.approx(0.5, abs=1 / 15)
    assert len(times[2]) == pytest.approx(2 * 4.7, abs=1.1)
    assert np.diff(times[2]).min() > 0.05


def test_what_cannot_be_done_is_said(clips, tmp_path):
    other = tmp_path / "else/a.mp4"
    other.parent.mkdir()
    other.write_bytes(clips[0].read_bytes())
    with pytest.raises(ValueError, match="two videos are named 'a'"):
        extract_frames([clips[0], other], tmp_path)
    with pytest.raises(ValueError, match="--fps must be a number above 0"):
        extract_frames(clips, tmp_path, fps=0.0)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"not a video")
    with pytest.raises(ValueError, match=r"broken\.mp4"):
        extract_frames([broken], tmp_path)


def test_a_video_that_ends_early_is_marked(clips, tmp_path):
    half = tmp_path / "half.mkv"
    content = clips[1].read_bytes()
    half.write_bytes(content[: len(content) // 2])
    [video] = extract_frames([half], tmp_path / "out")["videos"]
    assert 0 < video["frames"] < 30
    assert video["problem"]
