"""Frames from videos in every state, folders and what is neither (FAULTS 31)."""

import itertools
import shutil

import av
import cv2
import numpy as np
import pytest

from d2kit.video import Selection, VideoEncoder, open_source
from d2kit.video.overlay import Camera
from d2kit.video.video_file import _entry
from tests.support.clips import FPS, SIZE, ward_frames, write_video

IMAGES = [image for image, _ in ward_frames(seconds=2.0)]


def read(path, **selection):
    source = open_source(str(path), Selection(**selection))
    return source, list(source)


def close_to(image, original, limit=12):
    return np.abs(image.astype(int) - original).mean() < limit


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "ts"])
def test_every_frame_comes_with_the_files_time(tmp_path, suffix):
    path = write_video(tmp_path / f"clip.{suffix}", IMAGES)
    source, frames = read(path)
    assert [f.index for f in frames] == list(range(30))
    assert (source.seen, source.problem, source.damaged) == (30, "", 0)
    assert (source.info.width, source.info.height) == SIZE
    assert source.info.fps == pytest.approx(FPS)
    with av.open(str(path)) as container:
        times = [f.time for f in container.decode(video=0)]
    np.testing.assert_allclose([f.time for f in frames], times)
    assert all(close_to(f.image, IMAGES[f.index]) for f in frames)


def test_variable_frame_rate_keeps_time_stamps(tmp_path):
    times = np.cumsum(np.random.default_rng(0).choice([0.02, 0.05, 0.4], 30)).round(3)
    path = write_video(tmp_path / "clip.mkv", IMAGES, times)
    source, frames = read(path)
    np.testing.assert_allclose([f.time for f in frames], times, atol=0.0011)
    assert source.problem == ""


@pytest.mark.parametrize("angle", [90, 180, -90])
def test_rotation_flag_is_applied(tmp_path, angle):
    path = write_video(tmp_path / "clip.mp4", IMAGES[:3], rotation=angle)
    source, frames = read(path)
    upright = np.rot90(IMAGES[0], angle // 90)
    assert (source.info.height, source.info.width) == upright.shape[:2]
    assert close_to(frames[0].image, upright)
    assert not close_to(frames[0].image, np.rot90(upright, 2))


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize(
    ("selection", "indices"),
    [
        ({"stride": 4}, range(0, 30, 4)),
        ({"start": 1.0}, range(15, 30)),
        ({"start": 1.21, "stride": 3}, range(19, 30, 3)),
        ({"end": 0.5}, range(8)),
        ({"start": 0.5, "end": 1.0}, range(8, 15)),
    ],
)
def test_selection(tmp_path, suffix, selection, indices):
    path = write_video(tmp_path / f"clip.{suffix}", IMAGES)
    source, frames = read(path, **selection)
    assert [f.index for f in frames] == list(indices)
    assert all(close_to(f.image, IMAGES[f.index]) for f in frames)
    assert source.problem == ""
    assert abs(source.info.expected - len(frames)) <= 1


def test_a_late_start_decodes_from_a_key_frame_only(tmp_path):
    path = write_video(tmp_path / "clip.mp4", IMAGES)  # a key frame every 10
    assert _entry(path, 1.5)[:2] == (20, 20)
    assert _entry(path, 0.1)[:2] == (0, 0)


@pytest.mark.parametrize("selection", [{"stride": 0}, {"start": 2.0, "end": 1.0}])
def test_impossible_selections(selection):
    with pytest.raises(ValueError, match="--"):
        Selection(**selection)


def test_start_after_the_end(tmp_path):
    path = write_video(tmp_path / "clip.mp4", IMAGES)
    source = open_source(str(path), Selection(start=99.0))
    with pytest.raises(ValueError, match=r"30 frames go from 0\.000 s to 1\.933 s"):
        list(source)


@pytest.mark.parametrize("suffix", ["mkv", "avi", "ts", "fast.mp4"])
@pytest.mark.parametrize("share", [0.4, 0.8])
def test_cut_off_in_the_middle(tmp_path, suffix, share):
    """What is there is read; how much is missing is said where the file announces it."""
    path = tmp_path / f"clip.{suffix}"
    options = {"movflags": "+faststart"} if suffix == "fast.mp4" else {}
    write_video(path, IMAGES, options=options)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    source, frames = read(path)
    assert 0 < len(frames) < 29
    assert [f.index for f in frames] == list(range(len(frames)))
    assert source.seen == len(frames)
    if suffix != "ts":  # a transport stream announces nothing
        assert source.problem or source.damaged
    if suffix == "fast.mp4":
        assert "of 30 announced" in source.problem


def test_damaged_in_the_middle(tmp_path):
    path = write_video(tmp_path / "clip.ts", IMAGES)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 3000] = np.random.default_rng(0).bytes(3000)
    path.write_bytes(data)
    source, frames = read(path)
    assert len(frames) > 15
    assert source.damaged > 0 or source.problem


def test_mp4_without_its_index_is_explained(tmp_path):
    path = write_video(tmp_path / "clip.mp4", IMAGES)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="moov"):
        open_source(str(path), Selection())


def test_matroska_without_an_index_is_read(tmp_path):
    """Cues are left out by a live muxer: duration and index are unknown."""
    path = write_video(tmp_path / "clip.mkv", IMAGES, options={"live": "1"})
    source, frames = read(path, start=1.0)
    assert [f.index for f in frames] == list(range(15, 30))
    assert source.info.expected is None


def no_frames(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=15)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()
    return path


def sound_only(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        frame.sample_rate = 8000
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)
    return path


@pytest.mark.parametrize("suffix", ["mkv", "mp4", "avi"])
def test_a_video_without_frames(tmp_path, suffix):
    with pytest.raises(ValueError, match="0 frames|only nothing"):
        open_source(str(no_frames(tmp_path / f"clip.{suffix}")), Selection())


def test_what_is_no_video(tmp_path):
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "page.mp4").write_bytes(b"<html>not found</html>" * 50)
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    cv2.imwrite(str(tmp_path / "still.png"), IMAGES[0])
    cases = {
        "empty.mp4": "empty",
        "page.mp4": "cannot be read as a video",
        "noise.mp4": "cannot be read as a video",
        "still.png": "still picture",
    }
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message):
            open_source(str(tmp_path / name), Selection())
    with pytest.raises(ValueError, match="only audio"):
        open_source(str(sound_only(tmp_path / "sound.wav")), Selection())
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_source(str(tmp_path / "missing.mp4"), Selection())
    with pytest.raises(ValueError, match="URL"):
        open_source("http://localhost/clip.mp4", Selection())
    with pytest.raises(ValueError, match="camera"):
        open_source("97", Selection())


@pytest.fixture
def folder(tmp_path):
    """Return a folder with frame1.png ... frame12.png."""
    made = tmp_path / "frames"
    made.mkdir()
    for k in range(12):
        cv2.imwrite(str(made / f"frame{k + 1}.png"), IMAGES[k])
    return made


def test_folder_in_natural_order(folder):
    source = open_source(str(folder), Selection(stride=2), fps=10.0)
    frames = list(source)
    assert [f.index for f in frames] == [0, 2, 4, 6, 8, 10]
    assert [f.time for f in frames] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert source.info.expected == 6
    for frame in frames:
        np.testing.assert_array_equal(frame.image, IMAGES[frame.index])


def test_folder_with_damaged_pictures(folder):
    shutil.copy(folder / "frame1.png", folder / "frame13.png")
    (folder / "frame3.png").write_bytes(b"nothing")
    data = (folder / "frame5.png").read_bytes()
    (folder / "frame5.png").write_bytes(data[: len(data) // 2])
    source = open_source(str(folder), Selection())
    assert [f.index for f in source] == [0, 1, 3, *range(5, 13)]
    assert source.damaged == 2
    assert "2 pictures" in source.problem


def test_folder_with_mixed_sizes(folder):
    cv2.imwrite(str(folder / "frame20.png"), IMAGES[0][:60])
    with pytest.raises(ValueError, match=r"160x120: 12, .*160x60: 1, for example frame20.png"):
        open_source(str(folder), Selection())


def test_folder_without_pictures(tmp_path):
    with pytest.raises(ValueError, match="no picture"):
        open_source(str(tmp_path), Selection())
    (tmp_path / "a.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match="none of the 1"):
        open_source(str(tmp_path), Selection())


def test_camera_reads_until_it_gives_no_more(tmp_path):
    """OpenCV's capture reads files too, so a file stands for the camera here."""
    path = write_video(tmp_path / "clip.mp4", IMAGES)
    camera = Camera(str(path), Selection(stride=10))
    frames = list(camera)
    assert (camera.info.width, camera.info.height) == SIZE
    assert len(frames) == 3
    assert camera.seen == 30
    assert frames[0].time == 0
    assert all(a.time < b.time for a, b in itertools.pairwise(frames))
    assert "no picture" in camera.problem
    with pytest.raises(ValueError, match="no camera"):
        Camera(str(tmp_path / "missing.mp4"), Selection())


@pytest.mark.parametrize("size", [(64, 48), (63, 47)])
def test_encoder_makes_what_browsers_play(tmp_path, size):
    times = [5.0, 5.1, 5.1, 5.35, 6.0]  # a time stamp that comes twice
    encoder = VideoEncoder(tmp_path / "out.mp4", width=size[0], height=size[1], fps=10)
    rng = np.random.default_rng(0)
    plain = [np.full((size[1], size[0], 3), rng.integers(0, 255, 3), np.uint8) for _ in times]
    assert not (tmp_path / "out.mp4").exists()
    for image, time in zip(plain, times, strict=True):
        encoder.write(image, time)
    encoder.close()
    data = (tmp_path / "out.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    with av.open(str(tmp_path / "out.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert (stream.width, stream.height) == (64, 48)
        frames = list(container.decode(stream))
    np.testing.assert_allclose([f.time for f in frames], [0, 0.1, 0.1, 0.35, 1.0], atol=1e-4)
    for frame, image in zip(frames, plain, strict=True):
        got = frame.to_ndarray(format="bgr24")[: size[1], : size[0]]
        assert close_to(got, image, 6)
    assert [p.name for p in tmp_path.iterdir()] == ["out.mp4"]
