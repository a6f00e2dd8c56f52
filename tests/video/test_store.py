"""The file of detections: round trip, cut anywhere, continued, hostile."""

import gzip
import json

import numpy as np
import pytest

from d2kit.video import DetectionStore, DetectionWriter, FrameDetections
from tests.support.clips import FPS, header, ward_frames
from tests.support.clips import detections_of as truth


def records(count=12):
    rng = np.random.default_rng(0)
    frames = ward_frames(seconds=1.0)
    return [truth(frames[k][1], k, k / FPS, rng, miss=0.3) for k in range(count)]


def same(a, b):
    assert (a.index, a.time, a.masks) == (b.index, b.time, b.masks)
    for name in ("boxes", "scores", "classes"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def write(path, found, end=None, frames=3, append=None):
    writer = DetectionWriter(path, header(), append=append, frames=frames)
    for record in found:
        writer.write(record)
    writer.close(end)


@pytest.mark.parametrize("count", [0, 1, 12])
def test_round_trip_is_exact(tmp_path, count):
    path, made = tmp_path / "d.gz", records(count)
    write(path, made, {"frames": count})
    store = DetectionStore(path)
    read = list(store)
    assert len(read) == count
    for a, b in zip(made, read, strict=True):
        same(a, b)
    assert store.header["classes"] == header()["classes"]
    assert store.end == {"frames": count}
    assert gzip.decompress(path.read_bytes()).count(b"\n") == count + 2  # zcat reads it


def test_detections_without_masks_and_without_anything(tmp_path):
    none = FrameDetections(0, 0.0, np.zeros((0, 4)), [], [])
    boxes = FrameDetections(1, 0.04, [[1.234, 2, 3, 4]], [0.123456], [1])
    write(tmp_path / "d.gz", [none, boxes])
    read = list(DetectionStore(tmp_path / "d.gz"))
    same(none, read[0])
    same(boxes, read[1])
    assert read[1].boxes[0, 0] == np.float32(1.23)
    assert read[1].scores[0] == np.float32(0.1235)


def test_cut_anywhere_the_sound_part_is_read_and_continued(tmp_path):
    """What a kill leaves behind: every length of the file, a prefix of the frames each."""
    made = records()
    whole = tmp_path / "whole.gz"
    write(whole, made, {"frames": 12})
    data = whole.read_bytes()
    seen = set()
    for length in range(0, len(data), max(1, len(data) // 60)):
        path = tmp_path / "cut.gz"
        path.write_bytes(data[:length])
        try:
            store = DetectionStore(path)
        except ValueError:
            continue  # not even the header
        read = list(store)
        seen.add(len(read))
        for a, b in zip(made, read, strict=False):
            same(a, b)
        assert store.end is None
        write(path, made[len(read) :], {"frames": 12}, append=store)
        again = DetectionStore(path)
        assert len(list(again)) == 12
        assert again.end == {"frames": 12}
        assert not again.damage
    assert {0, 3, 6, 9} <= seen


def test_damage_is_named(tmp_path):
    path = tmp_path / "d.gz"
    write(path, records(), {"frames": 12})
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    store = DetectionStore(path)
    assert len(list(store)) < 12
    assert "after" in store.damage


def test_a_store_is_not_overwritten(tmp_path):
    write(tmp_path / "d.gz", [])
    with pytest.raises(FileExistsError):
        DetectionWriter(tmp_path / "d.gz", header())


def rewritten(path, **changes):
    """Write a sound file whose first frame has other values."""
    write(path, records(1))
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    frame = {**json.loads(lines[1]), **changes}
    path.write_bytes(gzip.compress("\n".join([lines[0], json.dumps(frame)]).encode()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": [1, 1, 1]}, "as many"),
        ({"boxes": [[1, 2, 3]], "scores": [1], "classes": [0], "masks": ["00"]}, "frame 0"),
        ({"boxes": [[1, 2, 3, 4]], "scores": [1], "classes": [0], "masks": ["~~~~"]}, "run-length"),
        ({"boxes": [[1, 2, 3, 4]], "scores": [1], "classes": [0], "masks": ["4"]}, "pixels"),
        ({"boxes": [[1, 2, 3, 1e999]], "scores": [1], "classes": [0], "masks": ["0"]}, "finite"),
        ({"frame": None}, "frame None"),
    ],
)
def test_hostile_records_are_refused(tmp_path, changes, message):
    path = tmp_path / "d.gz"
    rewritten(path, **changes)
    with pytest.raises(ValueError, match=message):
        list(DetectionStore(path))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("height", None), ("height", "60"), ("width", 0), ("width", 10**30), ("height", True)),
        *(("fps", 0), ("fps", "25"), ("fps", float("nan")), ("fps", 1e300), ("aspect", -1)),
        *(("classes", "person"), ("classes", [1]), ("bytes", -1), ("source", 7), ("model", [])),
        *(("selection", 7), ("selection", {"stride": 0}), ("selection", {"step": 1})),
        *(("selection", {"start": None}), ("selection", {"end": "x\ny"})),
    ],
)
def test_a_header_is_checked(tmp_path, key, value):
    path = tmp_path / "d.gz"
    write(path, records(1))
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    header = {**json.loads(lines[0]), key: value}
    path.write_bytes(gzip.compress("\n".join([json.dumps(header), *lines[1:]]).encode()))
    with pytest.raises(ValueError, match=f"header: {key}: expected") as error:
        DetectionStore(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("line", ["7", "[1]", "null", '"end"'])
def test_lines_that_are_no_objects(tmp_path, line):
    path = tmp_path / "d.gz"
    write(path, records(1))
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    path.write_bytes(gzip.compress("\n".join([lines[0], line]).encode()))
    with pytest.raises(ValueError, match="expected frames"):
        list(DetectionStore(path))
    path.write_bytes(gzip.compress(line.encode()))
    with pytest.raises(ValueError, match="not a file of detections"):
        DetectionStore(path)


@pytest.mark.parametrize(
    "content", [b"", b"hello", gzip.compress(b"hello\n", mtime=0), gzip.compress(b"{}", mtime=0)]
)
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "d.gz").write_bytes(content)
    with pytest.raises(ValueError, match="not a file of detections"):
        DetectionStore(tmp_path / "d.gz")


def test_missing_file_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="--from-detections"):
        DetectionStore(tmp_path / "none.gz")


def test_canonical_order_and_threshold():
    found = FrameDetections(
        0,
        0.0,
        [[5, 0, 9, 9], [1, 0, 9, 9], [0, 0, 2, 2]],
        [0.5, 0.5, 0.2],
        [0, 0, 0],
        ["a", "b", "c"],
    )
    assert found.chosen(0.5).masks == ["b", "a"]
    assert found.chosen(0.1).masks == ["b", "a", "c"]
    assert len(found.chosen(0.9)) == 0
