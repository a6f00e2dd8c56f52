"""Car types: the drawing, the boxes found by GrabCut, the folders read."""

import json

import cv2
import numpy as np
import pytest

from d2kit.data import DatasetCatalog, MetadataCatalog
from project import cars
from project.cars.dataset import cut_out


def iou(a, b):
    return 0.0 if a is None else (a & b).sum() / (a | b).sum()


@pytest.mark.parametrize("kind", cars.CLASS_NAMES)
def test_drawing_is_a_function_of_its_seed(kind):
    image, mask = cars.draw_car(kind, (1, 2))
    again, _ = cars.draw_car(kind, (1, 2))
    other, _ = cars.draw_car(kind, (1, 3))
    np.testing.assert_array_equal(image, again)
    assert (image != other).any()
    assert image.shape == (160, 240, 3)
    assert 0.08 < mask.mean() < 0.6
    assert not mask[0].any() and not mask[:, 0].any()  # noqa: PT018 - one statement about edges


def test_grabcut_finds_the_car():
    overlaps = []
    for kind in cars.CLASS_NAMES:
        for i in range(4):
            rgb, mask = cars.draw_car(kind, (9, i))
            overlaps.append(iou(cut_out(np.ascontiguousarray(rgb[..., ::-1])), mask))
    assert np.median(overlaps) > 0.75
    assert cut_out(np.full((160, 240, 3), 128, np.uint8)) is None, "nothing there"


@pytest.fixture
def registered(tmp_path):
    cars.write_synthetic(tmp_path / "cars/images", counts={"train": 2, "val": 1, "test": 1})
    yield tmp_path
    for split in ("train", "val", "test"):
        DatasetCatalog.pop(cars.split_name(split), None)
        MetadataCatalog.pop(cars.split_name(split), None)


def test_folders_become_a_dataset(registered):
    root = registered / "cars"
    (root / "images/train/suv/notes.txt").write_text("not a picture")
    counts = cars.prepare(root / "images", root)
    assert counts["train"]["images"] == 8
    assert counts["train"]["grabcut"] + counts["train"]["frame"] == 8
    for split in ("train", "val", "test"):
        DatasetCatalog.pop(cars.split_name(split), None)
        MetadataCatalog.pop(cars.split_name(split), None)
    cars.register(registered)
    records = DatasetCatalog.get("cars_train")
    assert len(records) == 8
    classes = [r["annotations"][0]["category_id"] for r in records]
    names = [cars.CLASS_NAMES[c] for c in classes]
    assert names == [r["file_name"].split("/")[-2] for r in records]
    before = (root / "val.json").read_bytes()
    cars.prepare(root / "images", root)
    assert (root / "val.json").read_bytes() == before, "the same pictures, the same file"


def test_the_published_layout(tmp_path):
    """Its folders, whose names differ in case and wording, and its numbers of pictures."""
    cars.write_synthetic(tmp_path / "images", counts={"Train": 2, "Validation": 1, "TEST": 1})
    (tmp_path / "images/Train/suv").rename(tmp_path / "images/Train/SUV")
    counts = cars.prepare(tmp_path / "images", tmp_path, grabcut=False)
    assert list(counts) == ["train", "val", "test"]
    assert json.loads((tmp_path / "val.json").read_text())["images"][0]["file_name"].startswith(
        "Validation/"
    )
    sizes = cars.read_sizes(tmp_path)
    assert sizes == {(160, 240)}
    text = cars.describe_set(counts, sizes)
    assert text.startswith("not the published set")
    assert "8 / 4 / 4 pictures of 160 x 240 (height x width)" in text
    published = {name: {"images": n} for name, n in (("train", 4957), ("val", 2887), ("test", 590))}
    assert cars.describe_set(published, sizes).startswith("the shape of the published set")
    assert "not the published" in cars.describe_set(published, {(160, 240), (100, 100)})
    (tmp_path / "images/train").mkdir()
    with pytest.raises(ValueError, match="are both 'train'"):
        cars.prepare(tmp_path / "images", tmp_path)
    (tmp_path / "images/train").rename(tmp_path / "images/night")
    with pytest.raises(ValueError, match="night: expected a split"):
        cars.prepare(tmp_path / "images", tmp_path)


@pytest.mark.parametrize(
    ("count", "expected"), [(100, (60, 20, 20)), (5, (3, 1, 1)), (12, (8, 2, 2))]
)
def test_drawn_cars_are_split_by_share(count, expected):
    assert tuple(cars.split_counts(count).values()) == expected


def test_too_few_cars_for_three_splits():
    with pytest.raises(ValueError, match="at least 5 drawn cars of each class, got 4"):
        cars.split_counts(4)


def test_full_frames(registered):
    root = registered / "cars"
    assert cars.prepare(root / "images", root, grabcut=False)["val"] == {
        "images": 4,
        "grabcut": 0,
        "frame": 4,
    }
    found = json.loads((root / "val.json").read_text())
    assert {tuple(a["bbox"]) for a in found["annotations"]} == {(0, 0, 240, 160)}


def test_unknown_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected folders SPLIT/CLASS/PICTURE"):
        cars.prepare(tmp_path, tmp_path / "out")
    (tmp_path / "train/truck").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"train/truck: expected a class folder"):
        cars.prepare(tmp_path, tmp_path / "out")
    (tmp_path / "train/truck").rename(tmp_path / "train/suv")
    with pytest.raises(FileNotFoundError, match="no pictures"):
        cars.prepare(tmp_path, tmp_path / "out")
    (tmp_path / "train/suv/1.jpg").write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"1\.jpg: cannot be read"):
        cars.prepare(tmp_path, tmp_path / "out")
    cv2.imwrite(str(tmp_path / "train/suv/1.jpg"), np.zeros((20, 30, 3), np.uint8))
    assert cars.prepare(tmp_path, tmp_path / "out")["train"]["images"] == 1
