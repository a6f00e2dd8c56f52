"""The experiments' datasets: what is written, and that it is read back as it was."""

import json
import zipfile

import numpy as np
import pytest

from d2kit.data import DatasetCatalog, MetadataCatalog
from d2kit.utils.file_io import extract_zip
from project import patient_video, pennfudan
from project.patient_video.dataset import WardSpec
from tests.support.archives import SHARED, small_archive


def _forget(*names):
    for name in names:
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)


def test_ward_dataset(tmp_path):
    from pycocotools import mask as mask_util

    root = tmp_path / "patient_video"
    spec = WardSpec(train_videos=1, test_videos=1, seconds=1.0, stride=5)
    assert patient_video.generate(root, spec, workers=2)
    assert not patient_video.generate(root, spec), "the second call finds it complete"
    train, test = (json.loads((root / f"{s}.json").read_text()) for s in ("train", "test"))
    assert {v["id"] for v in train["videos"]} == {0}
    assert {v["id"] for v in test["videos"]} == {1}
    assert test["videos"][0]["shaking"][0]["frequency"] > 2
    video = spec.video(1)
    first = next(a for a in test["annotations"] if a["track_id"] == 1)
    mask = mask_util.decode(first["segmentation"]).astype(bool)
    frame = next(im["frame_id"] for im in test["images"] if im["id"] == first["image_id"])
    np.testing.assert_array_equal(mask, video.render(frame)[1][0].mask)
    every = json.loads((root / "tracks/video01.json").read_text())
    assert len(every["images"]) == 15
    _forget(patient_video.TRAIN, patient_video.TEST)
    patient_video.register(tmp_path)
    assert len(DatasetCatalog.get(patient_video.TEST)) == 3
    assert MetadataCatalog.get(patient_video.TEST).thing_classes == ["patient", "staff"]
    _forget(patient_video.TRAIN, patient_video.TEST)


def test_pennfudan_split_and_masks(tmp_path):
    small_archive(tmp_path / "small.zip")
    counts = pennfudan.prepare(tmp_path / "small.zip", tmp_path / "pennfudan")
    assert counts == {"train.json": 10, "test.json": 50}
    train, test = (
        json.loads((tmp_path / "pennfudan" / f"{s}.json").read_text()) for s in ("train", "test")
    )
    ids = [{im["id"] for im in part["images"]} for part in (train, test)]
    assert not ids[0] & ids[1]
    assert ids[0] | ids[1] == set(range(1, 61))
    boxes = sorted(tuple(a["bbox"]) for a in test["annotations"][:2])
    assert boxes == [(4, 3, 4, 6), (15, 10, 14, 8)]
    before = (tmp_path / "pennfudan/test.json").read_bytes()
    pennfudan.prepare(tmp_path / "small.zip", tmp_path / "pennfudan")
    assert (tmp_path / "pennfudan/test.json").read_bytes() == before, "the split is reproducible"


def test_pennfudan_real(tmp_path):
    if not SHARED.is_file():
        pytest.skip(f"{SHARED} is not on this machine")
    pennfudan.prepare(SHARED, tmp_path)
    parts = [json.loads((tmp_path / f"{s}.json").read_text()) for s in ("train", "test")]
    assert [len(p["images"]) for p in parts] == [120, 50]
    assert sum(len(p["annotations"]) for p in parts) == 423


def test_wrong_archive_is_explained(tmp_path):
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as bundle:
        bundle.writestr("readme.txt", "nothing")
    with pytest.raises(ValueError, match="PNGImages"):
        pennfudan.prepare(tmp_path / "other.zip", tmp_path)
    with pytest.raises(FileNotFoundError, match="missing.zip"):
        pennfudan.prepare(tmp_path / "missing.zip", tmp_path)


def _zip_with(path, name, content=b"x", link=False):
    info = zipfile.ZipInfo(name)
    if link:
        info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bundle:
        bundle.writestr("good.txt", b"good")
        bundle.writestr(info, content, zipfile.ZIP_DEFLATED)


@pytest.mark.faults(30, fast=True)
@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("../evil", {}, "outside"),
        ("/etc/evil", {}, "outside"),
        ("C:\\evil", {}, "outside"),
        ("link", {"link": True, "content": b"/etc/passwd"}, "link"),
        ("bomb", {"content": bytes(8 << 20)}, "bomb"),
    ],
)
def test_hostile_archives_are_refused(tmp_path, name, options, reason):
    _zip_with(tmp_path / "a.zip", name, **options)
    with pytest.raises(ValueError, match=reason):
        extract_zip(tmp_path / "a.zip", tmp_path / "out")
    assert not (tmp_path / "out").exists(), "nothing is written, not even the good member"


@pytest.mark.faults(30, fast=True)
def test_archive_size_limit(tmp_path):
    _zip_with(tmp_path / "a.zip", "large", np.random.default_rng(0).bytes(5000))
    with pytest.raises(ValueError, match="at most 1,000"):
        extract_zip(tmp_path / "a.zip", tmp_path / "out", max_bytes=1000)
    (tmp_path / "b.zip").write_bytes(b"not a zip")
    with pytest.raises(ValueError, match="not a readable zip"):
        extract_zip(tmp_path / "b.zip", tmp_path / "out")
