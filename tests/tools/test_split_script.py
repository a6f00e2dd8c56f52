"""tools/split_data.py on videos of wards, which all look alike."""

import importlib.util
import json
import sys
from pathlib import Path

import cv2
import pytest

from project.patient_video.dataset import WardSpec

SCRIPT = Path(__file__).parents[2] / "tools/split_data.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("script_split_data", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    """Six frames, a third of a second apart, of each of six wards, in one COCO JSON file."""
    folder = tmp_path_factory.mktemp("frames")
    images = []
    for video in range(6):
        ward = WardSpec(seconds=20.0).video(video)
        (folder / f"v{video}").mkdir()
        for k in range(0, 30, 5):
            name = f"v{video}/{k:03d}.jpg"
            cv2.imwrite(str(folder / name), ward.render(k)[0][..., ::-1])
            image = {"id": len(images) + 1, "file_name": name, "video_id": video}
            images.append({**image, "height": 240, "width": 320})
    coco = {
        "videos": [{"id": v, "name": f"v{v}"} for v in range(6)],
        "images": images,
        "annotations": [],
        "categories": [{"id": 1, "name": "patient"}],
    }
    (folder / "all.json").write_text(json.dumps(coco))
    return folder


def call(script, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["split_data.py", *map(str, words)])
    return script.main()


def test_fair_split_of_wards_passes(script, frames, tmp_path, monkeypatch, capsys):
    common = ["--images", frames]
    words = [frames / "all.json", "--parts", "train=0.5", "test=0.5", "--group", "video"]
    assert call(script, monkeypatch, *words, "--output", tmp_path, *common) == 0
    parts = [tmp_path / "train.json", tmp_path / "test.json"]
    capsys.readouterr()
    assert call(script, monkeypatch, "--check", *parts, *common) == 0
    assert "0 groups and 0 pairs of images on both sides" in capsys.readouterr().out


@pytest.mark.parametrize("told", [True, False])
def test_a_ward_on_both_sides_is_found(script, frames, tmp_path, monkeypatch, capsys, told):
    """By its name, and where the file does not tell videos, by its looks."""
    coco = json.loads((frames / "all.json").read_text())
    train = [im for im in coco["images"] if im["video_id"] < 3]
    test = [im for im in coco["images"] if im["video_id"] >= 3]
    test.append(train.pop(4))  # one frame of the first ward
    if not told:
        coco["videos"] = []
        for part, images in (("a", train), ("b", test)):
            for number, im in enumerate(images):
                im["video"] = f"{part}{number}"
                del im["video_id"]
    for name, images in (("train", train), ("test", test)):
        (tmp_path / f"{name}.json").write_text(json.dumps({**coco, "images": images}))
    parts = [tmp_path / "train.json", tmp_path / "test.json"]
    assert call(script, monkeypatch, "--check", *parts, "--images", frames) == 1
    printed = capsys.readouterr().out
    assert ("video 'v0' is in train and test" in printed) == told
    found = [line for line in printed.splitlines() if line.startswith("look the same")]
    assert found
    assert all(line.count("v0/") == 2 and "v0/020.jpg" in line for line in found)
