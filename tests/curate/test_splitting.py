"""Splits and leaks."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2kit.curate.splitting import difference_hash, find_leaks, shared_groups, split_coco
from d2kit.data.records import group_images, read_coco
from project.patient_video.dataset import WardSpec


def dataset(videos=10, frames=8, seed=0):
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    for v in range(videos):
        for f in range(frames):
            image_id = v * 100 + f
            name = f"video{v}/{f}.jpg"
            images.append({"id": image_id, "file_name": name, "video_id": v, "ward": f"w{v % 3}"})
            for k in rng.choice(4, rng.integers(0, 4), p=[0.6, 0.25, 0.1, 0.05]):
                entry = {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(k) + 1,
                }
                annotations.append(entry)
    categories = [{"id": k + 1, "name": f"c{k}"} for k in range(4)]
    videos = [{"id": v, "name": f"video{v}"} for v in range(videos)]
    parts = {"images": images, "annotations": annotations, "categories": categories}
    return {**parts, "videos": videos}


@settings(max_examples=30, deadline=None)
@given(
    method=st.sampled_from(["random", "stratified", "group"]),
    videos=st.integers(3, 12),
    seed=st.integers(0, 100),
)
def test_every_image_is_in_exactly_one_part(method, videos, seed):
    coco = dataset(videos, 5, seed)
    shares = {"train": 0.6, "val": 0.2, "test": 0.2}
    parts = split_coco(coco, shares, method=method, seed=seed)
    ids = [im["id"] for part in parts.values() for im in part["images"]]
    assert sorted(ids) == sorted(im["id"] for im in coco["images"])
    assert all(part["images"] for part in parts.values())
    assert sum(len(p["annotations"]) for p in parts.values()) == len(coco["annotations"])
    for part in parts.values():
        present = {im["id"] for im in part["images"]}
        assert {a["image_id"] for a in part["annotations"]} <= present
    again = split_coco(coco, shares, method=method, seed=seed)
    assert again == parts
    if method == "group":
        assert not shared_groups(parts)
        assert {v["id"] for v in parts["val"]["videos"]} == {
            im["video_id"] for im in parts["val"]["images"]
        }


def test_stratified_keeps_the_share_of_every_class():
    coco = dataset(30, 10)
    parts = split_coco(coco, {"train": 0.75, "test": 0.25}, method="stratified")
    for k in range(1, 5):
        total = sum(a["category_id"] == k for a in coco["annotations"])
        got = sum(a["category_id"] == k for a in parts["test"]["annotations"])
        assert got == pytest.approx(total / 4, abs=max(2, 0.05 * total)), k
    assert len(parts["test"]["images"]) == pytest.approx(75, abs=4)


@pytest.mark.parametrize("method", ["random", "stratified", "group"])
@pytest.mark.parametrize("seed", range(4))
def test_sizes_and_rare_classes(method, seed):
    frames = 7
    coco = dataset(28, frames, seed)
    kept = [a for a in coco["annotations"] if a["category_id"] < 4]
    for number, image in enumerate((3, 1702)):  # two objects of class 4, in videos 0 and 17
        kept.append({"id": 9000 + number, "image_id": image, "category_id": 4})
    coco["annotations"] = kept
    for shares in ({"a": 0.8, "b": 0.2}, {"a": 0.7, "b": 0.15, "c": 0.15}):
        parts = split_coco(coco, shares, method=method, seed=seed)
        unit = frames if method == "group" else 1
        for name, share in shares.items():
            assert abs(len(parts[name]["images"]) - share * 28 * frames) <= unit
        if method != "random":
            holders = [any(a["category_id"] == 4 for a in p["annotations"]) for p in parts.values()]
            assert sum(holders) == 2


def test_groups_by_any_field():
    coco = dataset(6)
    assert list(group_images(coco)) == [f"video{v}" for v in range(6)]
    assert set(group_images(coco, "ward")) == {"w0", "w1", "w2"}
    assert list(group_images(coco, "folder")) == [f"video{v}" for v in range(6)]
    for image in coco["images"]:
        del image["video_id"]
    assert list(group_images(coco)) == [f"video{v}" for v in range(6)], "by folder then"
    with pytest.raises(ValueError, match="no field 'patient'"):
        group_images(coco, "patient")


@pytest.mark.parametrize(
    ("shares", "kwargs", "message"),
    [
        ({"a": 0.5, "b": 0.4}, {}, "add up to 1"),
        ({"a": 1.2, "b": -0.2}, {}, "positive"),
        ({"a": 0.5, "b": 0.5}, {"method": "fair"}, "expected one of"),
        ({"a": 0.5, "b": 0.5}, {"method": "group", "group": "all"}, "1 groups"),
    ],
)
def test_impossible_splits_are_refused(shares, kwargs, message):
    coco = dataset(3)
    for image in coco["images"]:
        image["all"] = "one"
    with pytest.raises(ValueError, match=message):
        split_coco(coco, shares, **kwargs)


def test_unreadable_files_are_named(tmp_path):
    (tmp_path / "a.json").write_text('{"images": []}')
    with pytest.raises(ValueError, match=r"a\.json: expected a list 'annotations'"):
        read_coco(tmp_path / "a.json")


def frames_of(tmp_path, video, indices):
    ward = WardSpec(seconds=20.0).video(video)
    files = []
    for k in indices:
        files.append(tmp_path / f"v{video}_{k}.jpg")
        cv2.imwrite(str(files[-1]), ward.render(k)[0][..., ::-1])
    return files


def test_a_video_on_both_sides_is_found_and_a_fair_split_passes(tmp_path):
    first = frames_of(tmp_path, 0, [0, 40, 80])
    neighbours = frames_of(tmp_path, 0, [2, 42])
    other = [*frames_of(tmp_path, 1, [0, 60]), *frames_of(tmp_path, 2, [0, 60])]
    assert find_leaks({"train": first, "test": other}) == []
    leaks = find_leaks({"train": first, "test": [*other, *neighbours]})
    assert {(leak.first, leak.second) for leak in leaks} >= {
        (str(first[0]), str(neighbours[0])),
        (str(first[1]), str(neighbours[1])),
    }
    assert find_leaks({}) == []


def test_hash_withstands_size_brightness_and_noise():
    rng = np.random.default_rng(0)
    image = cv2.resize(rng.integers(0, 255, (12, 16, 3), np.uint8), (320, 240), interpolation=3)
    changed = cv2.resize(image, (200, 150)).astype(float) * 0.7 + rng.normal(0, 3, (150, 200, 3))
    same = difference_hash(image) != difference_hash(changed.clip(0, 255).astype(np.uint8))
    assert same.mean() < 0.1
    other = cv2.resize(rng.integers(0, 255, (12, 16, 3), np.uint8), (320, 240), interpolation=3)
    assert (difference_hash(image) != difference_hash(other)).mean() > 0.3
