"""30 mutations of a COCO file: each is named, and the repaired copy loads, maps and scores 100."""

import copy
import json
import sys

import cv2
import numpy as np
import pytest
from pycocotools import mask as mask_util

from d2kit.curate.checking import check_dataset, repair_coco, survey_images
from d2kit.data import DatasetMapper, MetadataCatalog
from d2kit.data.datasets import load_coco_json
from d2kit.data.transforms import ResizeShortestEdge
from d2kit.evaluation.groups import ground_truth_ap
from tests.tools.test_scripts import REPO, _script

NAN, INF = float("nan"), float("inf")
H, W = 48, 64


def polygon(x, y, w, h):
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def crowd():
    rle = mask_util.frPyObjects(polygon(30, 5, 20, 30), H, W)[0]
    return {"size": [H, W], "counts": rle["counts"].decode()}


def annotation(number, image, category, x, y, w, h):
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": [x, y, w, h],
        "area": w * h,
        "iscrowd": 0,
        "segmentation": polygon(x, y, w, h),
    }


def sound():
    return {
        "images": [
            {"id": i, "file_name": f"f ü/{i}.png", "height": H, "width": W} for i in (1, 2, 3)
        ],
        "categories": [{"id": 2, "name": "cat"}, {"id": 5, "name": "dog"}],
        "annotations": [
            annotation(11, 1, 2, 4, 4, 20, 16),
            annotation(12, 1, 5, 30, 20, 24, 20),
            annotation(13, 2, 2, 10, 10, 30, 30),
            annotation(14, 3, 5, 8, 6, 40, 24),
            {**annotation(15, 3, 5, 30, 5, 20, 30), "iscrowd": 1, "segmentation": crowd()},
        ],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("checked")
    (root / "f ü").mkdir()
    rng = np.random.default_rng(0)
    for i in (1, 2, 3):
        cv2.imwrite(str(root / f"f ü/{i}.png"), rng.integers(0, 255, (H, W, 3), np.uint8))
    return root


def changed(key, value):
    """Set a field of annotation 12."""

    def mutate(d):
        d["annotations"][1][key] = value

    return mutate


def removed(key):
    def mutate(d):
        del d["annotations"][1][key]

    return mutate


def of_crowd(value):
    def mutate(d):
        d["annotations"][4]["segmentation"] = value

    return mutate


def of_image(key, value):
    def mutate(d):
        d["images"][1][key] = value

    return mutate


# name -> (mutation, what the line names, field, annotations that the repair keeps)
MUTATIONS = {
    "duplicate id": (changed("id", 11), "annotation 11", "id", 5),
    "id as text": (changed("id", "12"), "annotation 12", "id", 5),
    "id missing": (removed("id"), "annotation number 1", "id", 5),
    "unknown category": (changed("category_id", 99), "annotation 12", "category_id", 4),
    "category as text": (changed("category_id", "5"), "annotation 12", "category_id", 5),
    "category missing": (removed("category_id"), "annotation 12", "category_id", 4),
    "unknown image": (changed("image_id", 99), "annotation 12", "image_id", 4),
    "image as text": (changed("image_id", "1"), "annotation 12", "image_id", 5),
    "NaN box": (changed("bbox", [NAN, 20, 24, 20]), "annotation 12", "bbox", 5),
    "infinite box": (changed("bbox", [30, 20, INF, 20]), "annotation 12", "bbox", 5),
    "inverted box": (changed("bbox", [54, 40, -24, -20]), "annotation 12", "bbox", 5),
    "box as text": (changed("bbox", ["30", "20", "24", "20.0"]), "annotation 12", "bbox", 5),
    "box missing": (removed("bbox"), "annotation 12", "bbox", 5),
    "box past the edge": (changed("bbox", [30, 20, 90, 20]), "annotation 12", "bbox", 5),
    "box outside": (changed("bbox", [300, 20, 24, 20]), "annotation 12", "bbox", 5),
    "empty box": (changed("bbox", [30, 20, 0, 20]), "annotation 12", "bbox", 5),
    "NaN area": (changed("area", NAN), "annotation 12", "area", 5),
    "wrong area": (changed("area", 7.0), "annotation 12", "area", 5),
    "area missing": (removed("area"), "annotation 12", "area", 5),
    "iscrowd missing": (removed("iscrowd"), "annotation 12", "iscrowd", 5),
    "iscrowd of 2": (changed("iscrowd", 2), "annotation 12", "iscrowd", 5),
    "empty polygon": (changed("segmentation", [[]]), "annotation 12", "segmentation", 4),
    "odd polygon": (
        changed("segmentation", [[30, 20, 54, 20, 54, 40, 30]]),
        "annotation 12",
        "segmentation",
        4,
    ),
    "2-point polygon": (
        changed("segmentation", [[1, 2, 3, 4]]),
        "annotation 12",
        "segmentation",
        4,
    ),
    "flat list": (
        changed("segmentation", polygon(30, 20, 24, 20)[0]),
        "annotation 12",
        "segmentation",
        5,
    ),
    "NaN polygon": (
        changed("segmentation", [[30, 20, 54, NAN, 54, 40]]),
        "annotation 12",
        "segmentation",
        4,
    ),
    "one polygon bad": (
        changed("segmentation", [*polygon(30, 20, 24, 20), [1, 2]]),
        "annotation 12",
        "segmentation",
        5,
    ),
    "polygon far outside": (
        changed("segmentation", [[30, 20, 1e300, 20, 54, 40]]),
        "annotation 12",
        "segmentation",
        5,
    ),
    "huge id": (changed("id", 10**400), f"annotation {10**400}", "id", 5),
    "huge area": (changed("area", 10**400), "annotation 12", "area", 5),
    "mask missing": (removed("segmentation"), "annotation 12", "segmentation", 4),
    "crowd without RLE": (
        of_crowd(polygon(30, 5, 20, 30)),
        "annotation 15",
        "segmentation",
        5,
    ),
    "RLE of the wrong size": (
        of_crowd({**crowd(), "size": [W, H]}),
        "annotation 15",
        "segmentation",
        4,
    ),
    "RLE damaged": (
        of_crowd({"size": [H, W], "counts": "~~"}),
        "annotation 15",
        "segmentation",
        4,
    ),
    "not an object": (
        lambda d: d["annotations"].append(7),
        "annotation number 5",
        "entry",
        5,
    ),
    "image size as text": (of_image("height", str(H)), "image 2", "height", 5),
    "image size wrong": (of_image("height", 20), "image 2", "width, height", 5),
    "image size missing": (lambda d: d["images"][1].pop("width"), "image 2", "width", 5),
    "image outside": (of_image("file_name", "../2.png"), "image 2", "file_name", 4),
    "image absolute": (of_image("file_name", "/etc/hostname"), "image 2", "file_name", 4),
    "image as URL": (of_image("file_name", "http://x/2.png"), "image 2", "file_name", 4),
    "image not there": (of_image("file_name", "no.png"), "image 2", "file_name", 4),
    "image twice": (
        lambda d: d["images"].append(copy.deepcopy(d["images"][1])),
        "image 2",
        "id",
        5,
    ),
    "category twice": (
        lambda d: d["categories"].append({"id": 5, "name": "cow"}),
        "category 5",
        "id",
        5,
    ),
    "category name twice": (
        lambda d: d["categories"].append({"id": 6, "name": "cat"}),
        "category 6",
        "name",
        5,
    ),
    "category without name": (
        lambda d: d["categories"].append({"id": 6}),
        "category 6",
        "name",
        5,
    ),
}


def write(path, data):
    path.write_text(json.dumps(data))
    return path


def errors(found):
    return [f for f in found if f.level == "error"]


def test_sound_file(tmp_path, folder):
    file = write(tmp_path / "sound.json", sound())
    assert errors(check_dataset(file, folder)) == []
    fixed, done = repair_coco(sound(), "sound.json", survey_images(sound()["images"], folder))
    assert fixed == sound()
    assert done == []
    assert ground_truth_ap(file) == pytest.approx({"bbox": 100, "segm": 100})
    assert ground_truth_ap(file, use_fast_impl=False) == pytest.approx({"bbox": 100, "segm": 100})


@pytest.mark.faults(24, fast=True)
@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_named_and_repaired(name, tmp_path, folder):
    mutate, where, field, kept = MUTATIONS[name]
    data = sound()
    mutate(data)
    file = write(tmp_path / "broken.json", data)
    found = errors(check_dataset(file, folder))
    lines = [str(f) for f in found if (f.where, f.field) == (where, field)]
    assert len(lines) == 1, found
    assert lines[0].startswith(f"{file}: {where}: {field}: ")
    assert "\n" not in lines[0]

    before = copy.deepcopy(data)
    fixed, done = repair_coco(data, str(file), survey_images(data["images"], folder))
    assert json.dumps(data) == json.dumps(before)
    assert done
    assert len(fixed["annotations"]) == kept
    copied = tmp_path / "fixed.json"
    copied.write_text(json.dumps(fixed, allow_nan=False))
    assert errors(check_dataset(copied, folder)) == []
    records = load_coco_json(copied, folder, f"checked {name}")
    MetadataCatalog.remove(f"checked {name}")
    assert sum(len(r["annotations"]) for r in records) == kept
    mapper = DatasetMapper(
        True,
        augmentations=[ResizeShortestEdge(H, W)],
        image_format="BGR",
        use_instance_mask=True,
        instance_mask_format="bitmask",
    )
    for record in records:
        instances = mapper(record)["instances"]
        crowds = sum(a["iscrowd"] for a in record["annotations"])
        assert len(instances) == len(record["annotations"]) - crowds
    assert ground_truth_ap(copied) == pytest.approx({"bbox": 100, "segm": 100})


@pytest.mark.parametrize(
    ("data", "field"),
    [
        ({"images": [], "annotations": [], "categories": []}, "images"),
        ({**sound(), "annotations": []}, "annotations"),
        ({**sound(), "annotations": sound()["annotations"][4:]}, "annotations"),
        ({**sound(), "categories": None}, "categories"),
        ({**sound(), "annotations": {}}, "annotations"),
    ],
)
def test_whole(tmp_path, data, field):
    found = errors(check_dataset(write(tmp_path / "d.json", data)))
    assert [f.field for f in found if f.where == "top level"][:1] == [field]


def test_boxes_only_dataset_stays_one(tmp_path):
    data = sound()
    for a in data["annotations"][1:4]:
        del a["segmentation"]
    data["annotations"].pop()
    fixed, _ = repair_coco(data, "d.json")
    assert [a.get("segmentation", []) for a in fixed["annotations"]] == [[]] * 4
    assert errors(check_dataset(write(tmp_path / "d.json", fixed))) == []


IMAGES = {
    "truncated": (lambda b: b[: len(b) // 2], "truncated"),
    "empty": (lambda b: b"", "empty"),
    "HTML": (lambda b: b"<html>", "not an image"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_damaged_image_is_named(name, tmp_path, folder):
    damage, what = IMAGES[name]
    (tmp_path / "f ü").mkdir()
    for i in (1, 2, 3):
        raw = (folder / f"f ü/{i}.png").read_bytes()
        (tmp_path / f"f ü/{i}.png").write_bytes(damage(raw) if i == 2 else raw)
    file = write(tmp_path / "d.json", sound())
    (found,) = errors(check_dataset(file, tmp_path))
    assert found.where == "image 2"
    assert what in found.what
    assert "f ü/2.png" in found.what
    fixed, _ = repair_coco(sound(), str(file), survey_images(sound()["images"], tmp_path))
    assert [im["id"] for im in fixed["images"]] == [1, 3]
    assert errors(check_dataset(write(file, fixed), tmp_path)) == []


def test_health_check_adds_notes(tmp_path):
    data = sound()
    data["annotations"].append({**data["annotations"][0], "id": 16})
    notes = [f for f in check_dataset(write(tmp_path / "d.json", data)) if f.level == "note"]
    assert "near_duplicate" in {f.field for f in notes}


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["check_data.py", *map(str, args)])
    return _script("check_data").main()


def test_tool(tmp_path, folder, monkeypatch, capsys):
    good = write(tmp_path / "good.json", sound())
    assert run(monkeypatch, good, "--images", folder, "--ground-truth-ap") == 0
    assert "segm AP 100.00" in capsys.readouterr().out
    data = sound()
    for mutate in ("inverted box", "image size wrong", "RLE damaged", "wrong area"):
        MUTATIONS[mutate][0](data)
    bad = write(tmp_path / "bad.json", data)
    assert run(monkeypatch, bad, "--images", folder) == 1
    shown = capsys.readouterr().out
    for line in ("annotation 12: bbox", "image 2: width, height", "annotation 15: segmentation"):
        assert f"{bad}: {line}: " in shown
    fix = tmp_path / "fix.json"
    assert run(monkeypatch, bad, "--images", folder, "--fix", fix, "--ground-truth-ap") == 0
    assert "annotation 15: segmentation: left out" in capsys.readouterr().out


@pytest.mark.slow
def test_repaired_file_trains(tmp_path, folder, monkeypatch):
    from d2kit.config import get_cfg
    from d2kit.data.datasets import register_dataset
    from d2kit.engine import DefaultTrainer
    from tests.tools.test_scripts import TINY

    data = sound()
    for mutate in ("inverted box", "image size wrong", "RLE damaged", "flat list", "id missing"):
        MUTATIONS[mutate][0](data)
    bad, fix = write(tmp_path / "bad.json", data), tmp_path / "fix.json"
    assert run(monkeypatch, bad, "--images", folder, "--fix", fix) == 0
    register_dataset("repaired", fix, folder)
    cfg = get_cfg()
    cfg.merge_from_file(str(REPO / "configs/PatientVideo/mask_rcnn_R_18_FPN_demo.yaml"))
    for section, values in TINY.items():
        for key, value in values.items():
            for name, v in value.items() if isinstance(value, dict) else [(None, value)]:
                cfg.merge_from_list([f"{section}.{key}" + (f".{name}" if name else ""), v])
    cfg.merge_from_list(
        ["DATASETS.TRAIN", ("repaired",), "DATASETS.TEST", (), "MODEL.WEIGHTS", ""]
        + ["SOLVER.MAX_ITER", 3, "OUTPUT_DIR", str(tmp_path / "run"), "TEST.EVAL_PERIOD", 0]
    )
    trainer = DefaultTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert trainer.iter == 3
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 7
    cfg.OUTPUT_DIR = str(tmp_path / "other")
    with pytest.raises(ValueError, match=r"configured for 7 classes, but dataset 'repaired' has 2"):
        DefaultTrainer(cfg)
