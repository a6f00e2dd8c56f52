"""`d2kit train --data`: one command from a folder to a trained model."""

import json

import cv2
import numpy as np
import pytest
import torch

import d2kit
from d2kit.cli.train import recipe_main, seconds_per_iteration, train, train_main
from d2kit.config import get_cfg
from d2kit.curate.conversion import WRITERS
from d2kit.curate.prepare import prepare
from d2kit.data.datasets.validate import DatasetError
from d2kit.structures import pairwise_iou

QUICK = (
    "SOLVER.MAX_ITER 2 TEST.EVAL_PERIOD 0 SOLVER.EARLY_STOPPING.PATIENCE 0 MODEL.DEVICE cpu "
    "DATALOADER.NUM_WORKERS 0 INPUT.MIN_SIZE_TRAIN [64] INPUT.MIN_SIZE_TEST 64 "
    "INPUT.MAX_SIZE_TEST 96"
)


def drawn(folder, images=10, names=lambda i: f"{i}.png"):
    """Write pictures with a bright box each; return their COCO dictionary."""
    rng = np.random.default_rng(0)
    coco = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "box"}]}
    for i in range(images):
        picture = rng.integers(0, 60, (96, 128, 3)).astype(np.uint8)
        x, y = int(rng.integers(4, 60)), int(rng.integers(4, 40))
        picture[y : y + 40, x : x + 50] = 200
        path = folder / names(i)
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), picture)
        coco["images"].append({"id": i + 1, "file_name": names(i), "width": 128, "height": 96})
        points = [x, y, x + 50, y, x + 50, y + 40, x, y + 40]
        entry = {"id": i + 1, "image_id": i + 1, "category_id": 1, "bbox": [x, y, 50, 40]}
        coco["annotations"].append(entry | {"segmentation": [points], "iscrowd": 0, "area": 2000})
    return coco


def write(name, coco, folder):
    if name in WRITERS:
        target = {"coco": folder / "train.json", "cvat": folder / "annotations.xml"}
        WRITERS[name](coco, target.get(name, folder))
        return
    region = {"name": "polygon"}
    entries = {}
    for image, a in zip(coco["images"], coco["annotations"], strict=True):
        points = a["segmentation"][0]
        shape = {**region, "all_points_x": points[::2], "all_points_y": points[1::2]}
        file = {"filename": image["file_name"], "regions": []}
        file["regions"].append({"shape_attributes": shape, "region_attributes": {"class": "box"}})
        entries[image["file_name"]] = file
    (folder / "via.json").write_text(json.dumps(entries))


@pytest.mark.parametrize("name", [*WRITERS, "via"])
def test_every_format_is_prepared(name, tmp_path):
    coco = drawn(tmp_path / "set")
    write(name, coco, tmp_path / "set")
    made = prepare(tmp_path / "set", tmp_path / "out")
    assert {k: len(v["images"]) for k, v in made.data.items()} == {"train": 8, "test": 2}
    files = [i["file_name"] for part in made.data.values() for i in part["images"]]
    assert all((made.images / f).is_file() for f in files)
    assert {c["name"] for c in made.data["train"]["categories"]} == {"box"}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (lambda i: f"{'train' if i < 14 else 'valid'}/{i}.png", "own"),
        (lambda i: f"v{i // 5}/{i}.png", "4 videos"),
        (lambda i: f"ward{i // 5}cam_frame_{i:04d}.png", "4 videos"),
        (lambda i: f"pic-{i}.png", "random"),
    ],
)
def test_splits(names, expected, tmp_path):
    coco = drawn(tmp_path / "set", 20, names)
    (tmp_path / "set/labels.json").write_text(json.dumps(coco))
    made = prepare(tmp_path / "set", tmp_path / "out")
    assert any(line.startswith("split: ") and expected in line for line in made.report)
    sides = [{i["file_name"] for i in part["images"]} for part in made.data.values()]
    assert len(sides) == 2
    assert not sides[0] & sides[1]
    if "videos" in expected:
        videos = [{i["video"] for i in part["images"]} for part in made.data.values()]
        assert len(videos[0] | videos[1]) == 4
        assert not videos[0] & videos[1]


def several(folder, **files):
    """Write the picture numbers of each COCO file, of 20 that are drawn; return the folder."""
    coco = drawn(folder, 20)
    for name, (numbers, change) in files.items():
        chosen = set(numbers)
        of_file = {
            "images": [i for i in coco["images"] if i["id"] in chosen],
            "annotations": [dict(a) for a in coco["annotations"] if a["image_id"] in chosen],
            "categories": coco["categories"],
        }
        change(of_file)
        path = folder / f"{name.replace('__', '/')}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(of_file))
    return folder


def as_it_is(coco):
    pass


def broken(coco):
    coco["annotations"][0]["category_id"] = 9


def a_whole_video(coco):
    """Truth of all frames of a video, of which only some are stored; with a defect."""
    broken(coco)
    for i, name in enumerate(("never.png", "a\0b", "x" * 5000, ["no", "text"])):
        coco["images"].append({"id": 90 + i, "file_name": name, "width": 128, "height": 96})


def test_truths_of_videos_beside_train_and_test_are_left_out(tmp_path):
    folder = several(
        tmp_path / "set",
        train=(range(1, 15), as_it_is),
        test=(range(15, 21), as_it_is),
        tracks__video1=(range(15, 19), a_whole_video),
    )
    made = prepare(folder, tmp_path / "out")
    assert {name: len(part["images"]) for name, part in made.data.items()} == {
        "train": 14,
        "test": 6,
    }
    assert "left out: 1 files that repeat the images of train and test" in made.report


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"a": (range(1, 9), as_it_is), "b": (range(8, 12), as_it_is)},
            r"'a.json' and 'b.json' both label '7.png': which is meant\? Name the file",
        ),
        (
            {"a": (range(1, 9), as_it_is), "b": (range(9, 12), broken)},
            r"1 of its 2 COCO files have errors: b.json. Look with `d2kit check .*b.json --images",
        ),
    ],
)
def test_files_that_do_not_go_together_are_named(files, message, tmp_path):
    with pytest.raises(DatasetError, match=message):
        prepare(several(tmp_path / "set", **files), tmp_path / "out")


@pytest.mark.parametrize(("bare", "masks"), [(1, 19), (2, 0), (20, 0)])
def test_objects_without_a_mask(bare, masks, tmp_path):
    """One of many is left out; more of them, and all objects are learned as boxes."""
    coco = drawn(tmp_path / "set", 20)
    for a in coco["annotations"][:bare]:
        a["segmentation"] = []
    (tmp_path / "set/labels.json").write_text(json.dumps(coco))
    made = prepare(tmp_path / "set", tmp_path / "out")
    objects = [a for part in made.data.values() for a in part["annotations"]]
    assert sum(bool(a["segmentation"]) for a in objects) == masks
    assert len(objects) == (masks or 20)
    told = " ".join(made.report)
    assert ("2 of 20 objects have none" in told) == (bare == 2)


def test_recipe_is_printed(tmp_path, capsys):
    coco = drawn(tmp_path / "set", 6)
    write("voc", coco, tmp_path / "set")
    recipe_main(["--data", str(tmp_path / "set"), "--epochs", "2"])
    printed = capsys.readouterr().out
    assert "MODEL.MASK_ON" in printed
    assert "0 of 5 objects have a mask" in " ".join(printed.split())


def test_a_recipe_is_timed_with_the_matches_of_a_model_that_has_learned(monkeypatch):
    """A network at its start matches few proposals, so that its heads have little to do."""
    seen = []

    class Recorder(torch.nn.Linear):
        def forward(self, inputs):
            seen.append(inputs)
            return {"loss": super().forward(torch.ones(1)).sum()}

    monkeypatch.setattr("d2kit.cli.train.build_model", lambda cfg: Recorder(1, 1))
    cfg = get_cfg()
    cfg.SOLVER.IMS_PER_BATCH = 3
    assert 0 < seconds_per_iteration(cfg, (100, 200)) < 5
    assert {len(inputs) for inputs in seen} == {3}
    for one in seen[-1]:
        boxes = one["instances"].gt_boxes
        assert len(boxes) == len(one["instances"].gt_masks) == 14
        assert boxes.tensor.min() >= 0
        assert (boxes.tensor.amax(0) <= torch.tensor([200, 100, 200, 100])).all()
        matched = (pairwise_iou(boxes, boxes[:2]) > 0.7).sum(0)
        assert (matched >= 6).all(), "the copies are proposals of another object"


def test_no_labels_are_one_message(tmp_path, capsys):
    drawn(tmp_path / "set", 2)
    with pytest.raises(SystemExit):
        train_main(["--data", str(tmp_path / "set")])
    assert "2 pictures and no annotations" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["voc", "coco", "yolo"])
def test_labels_without_their_pictures_say_so(name, tmp_path, capsys):
    write(name, drawn(tmp_path / "set", 4), tmp_path / "set")
    for picture in (tmp_path / "set").rglob("*.png"):
        picture.unlink()
    with pytest.raises(SystemExit):
        train_main(["--data", str(tmp_path / "set"), "--output", str(tmp_path / "out")])
    said = capsys.readouterr().err
    known = ("give the one that holds annotations and images", "found no images")
    assert any(words in said for words in known), said
    assert "repair mends" not in said
    assert not (tmp_path / "out/train.yaml").exists()


def as_roboflow(folder):
    """Draw pictures in the folders train and valid, each with its own `_annotations.coco.json`."""
    for part, count in (("train", 8), ("valid", 3)):
        coco = drawn(folder / part, count)
        # Roboflow's class 0 is only the group of the others.
        coco["categories"].insert(0, {"id": 0, "name": "boxes", "supercategory": "none"})
        coco["categories"][1]["supercategory"] = "boxes"
        (folder / part / "_annotations.coco.json").write_text(json.dumps(coco))


def test_the_same_in_python():
    assert d2kit.train is train


@pytest.mark.slow
@pytest.mark.parametrize("name", ["voc", "yolo", "labelme", "cvat", "via", "roboflow"])
def test_one_command_to_a_page(name, tmp_path):
    if name == "roboflow":
        as_roboflow(tmp_path / "set")
    else:
        write(name, drawn(tmp_path / "set"), tmp_path / "set")
    out = tmp_path / "run"
    train_main(
        ["--data", str(tmp_path / "set"), "--output", str(out), "--epochs", "1", *QUICK.split()]
    )
    cfg = get_cfg()
    cfg.merge_from_file(str(out / "train.yaml"))
    assert cfg.SOLVER.MAX_ITER == 2
    assert name != "roboflow" or cfg.MODEL.ROI_HEADS.NUM_CLASSES == 1
    assert (out / "model_final.pth").is_file()
    page = (out / "report.html").read_text()
    assert "<html" in page
    assert cfg.DATASETS.TEST[0] in page
    metrics = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    assert metrics[-1]["bbox/AP"] >= 0
    assert ("segm/AP" in metrics[-1]) == (name != "voc")
