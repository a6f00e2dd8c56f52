"""All records are looked through before step 0: what mapper, model or evaluator would refuse."""

import numpy as np
import pytest

from d2kit.config import get_cfg
from d2kit.data import DatasetCatalog, DatasetError, MetadataCatalog
from d2kit.engine.preflight.records import (
    DefaultRecordCheck,
    check_same_classes,
    learned_parts,
)
from d2kit.engine.preflight.report import object_warnings, schedule_warnings
from d2kit.structures import BoxMode

NAME = "zz_preflight_records"
SQUARE = [[5, 5, 25, 5, 25, 25, 5, 25]]
MASKS, KEYPOINTS = ("MODEL.MASK_ON", True), ("MODEL.KEYPOINT_ON", True)
THREE = (*KEYPOINTS, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 3)


def make(*options):
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.META_ARCHITECTURE", "GeneralizedRCNN", *options])
    return cfg


def thing(**changes):
    return {
        "bbox": [5, 5, 20, 20],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": 0,
        "segmentation": SQUARE,
        "keypoints": [6, 6, 2] * 3,
        **changes,
    }


def record(*things, number=1, **changes):
    size = {"height": 40, "width": 60}
    return {
        "file_name": f"{number}.png",
        "image_id": number,
        **size,
        "annotations": list(things),
        **changes,
    }


def training(records, *options, classes=2):
    found = DefaultRecordCheck(make(*options))
    found.look_at_training("a", records, classes)
    return found


@pytest.fixture
def metadata():
    yield MetadataCatalog.get(NAME)
    MetadataCatalog.data.pop(NAME, None)


def evaluation(metadata, records, *options, **known):
    metadata.set(evaluator_type="coco", thing_classes=["cat", "dog"], **known)
    found = DefaultRecordCheck(make(*options))
    found.look_at_test(NAME, records)
    return found


# ---- training


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ((), {"boxes"}),
        (MASKS, {"boxes", "masks"}),
        ((*MASKS, *KEYPOINTS), {"boxes", "masks", "keypoints"}),
        (("MODEL.ROI_HEADS.NAME", "RROIHeads"), {"rotated boxes"}),
    ],
)
def test_what_a_model_learns_from(options, parts):
    assert learned_parts(make(*options)) >= parts
    assert not ({"boxes", "rotated boxes"} - parts) & learned_parts(make(*options))


@pytest.mark.parametrize("options", [(), MASKS, THREE, (*MASKS, *THREE)])
def test_sound_records_pass(options):
    masks = ({"size": [40, 60], "counts": b"x"}, np.ones((40, 60), bool), SQUARE)
    records = [record(thing(segmentation=m), number=i) for i, m in enumerate(masks)]
    # numpy's numbers are numbers, and a crowd is not learned from
    records.append(record(thing(category_id=np.int64(1), bbox=np.arange(1.0, 5.0)), number=8))
    records.append(record(thing(iscrowd=1, bbox=None, segmentation=None, keypoints=None), number=9))
    found = training(records, *options)
    assert (found.errors, found.warnings) == ([], [])
    found.raise_if_any()


@pytest.mark.parametrize(
    ("changes", "options", "said"),
    [
        ({"bbox": None}, (), "have no 'bbox' of 4 finite numbers"),
        ({"bbox": [1, 2, 3]}, (), "have no 'bbox' of 4 finite numbers"),
        ({"bbox": [1, 2, float("nan"), 4]}, (), "have no 'bbox' of 4 finite numbers"),
        ({"bbox": [1, 2, "3", 4]}, (), "have no 'bbox' of 4 finite numbers"),
        ({"bbox": [9, 9, 4, 4, 30]}, (), "only MODEL.PROPOSAL_GENERATOR.NAME RRPN trains"),
        ({"category_id": "0"}, (), "category_id that is no integer"),
        ({"category_id": 0.0}, (), "category_id that is no integer"),
        ({"category_id": 2}, (), r"outside of [0, 2)"),
        ({"category_id": -1}, (), r"outside of [0, 2)"),
        ({"segmentation": None}, MASKS, "have no mask, and MODEL.MASK_ON is true"),
        ({"segmentation": []}, MASKS, "have no mask, and MODEL.MASK_ON is true"),
        ({"segmentation": [[1, 2, 3, 4]]}, MASKS, "even number, at least 6"),
        ({"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, MASKS, "even number, at least 6"),
        ({"segmentation": [1, 2, 3, 4, 5, 6]}, MASKS, "even number, at least 6"),
        ({"segmentation": "mask"}, MASKS, "no list of polygons, run-length mask or array"),
        ({"segmentation": np.ones((60, 40), bool)}, MASKS, "another size than their image"),
        ({"segmentation": {"size": [60, 40], "counts": b""}}, MASKS, "another size"),
        ({"keypoints": None}, THREE, "do not have 3 keypoints"),
        ({"keypoints": [1, 2, 2] * 4}, THREE, "do not have 3 keypoints"),
    ],
)
def test_what_training_would_refuse(changes, options, said):
    records = [record(thing()), record(thing(), thing(**changes), number=7)]
    found = training(records, *options)
    (line,) = found.errors
    assert said in line
    assert line.startswith("dataset a: 1 of 3 objects")
    assert line.endswith("in [7.png]")
    with pytest.raises(DatasetError, match="7.png"):
        found.raise_if_any()


def test_a_field_that_is_missing_is_refused_as_an_empty_one():
    bare = {"category_id": 0}
    assert len(training([record(bare)], *MASKS, *THREE).errors) == 3
    assert training([record(thing(segmentation=None, keypoints=None))]).errors == []


def test_many_of_a_kind_are_one_line_and_several_kinds_have_a_title():
    many = [record(thing(category_id=5), number=i) for i in range(9)]
    found = training([*many, record(thing(bbox=None), number=10)])
    assert found.errors[0].startswith("dataset a: 9 of 10 objects have a category_id outside")
    assert found.errors[0].endswith("in [0.png, 1.png, 2.png, 3.png, 4.png, ... (9)]")
    with pytest.raises(DatasetError, match=r"^the training or its evaluation would fail\n"):
        found.raise_if_any()


def test_one_file_of_several_images_is_a_warning():
    records = [record(thing()), record(thing(), image_id=2), record(thing(), number=3)]
    (line,) = training(records).warnings
    assert "1 files are those of several images: [1.png]" in line


# ---- evaluation


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (["a", 2], "1 of 2 records have an image_id that is no integer >= 0 (['a'])"),
        ([None, None], "2 of 2 records have an image_id"),
        ([-1, 2], "1 of 2 records"),
        ([True, 2], "1 of 2 records"),
        ([1.5, 2], "1 of 2 records"),
        ([4, 4], "image_id [4] is that of several records"),
    ],
)
def test_ids_that_cannot_be_compared(metadata, ids, said):
    records = [record(thing(), number=n, image_id=i) for n, i in enumerate(ids)]
    (line,) = evaluation(metadata, records).errors
    assert said in line


def test_ids_of_numpy_are_integers(metadata):
    records = [record(thing(), number=n, image_id=np.int64(n)) for n in range(3)]
    assert evaluation(metadata, records).errors == []


def test_a_test_set_without_class_names_has_no_evaluator(metadata):
    found = DefaultRecordCheck(make())
    found.look_at_test(NAME, [record(thing())])
    assert "thing_classes=[...]" in found.errors[0]
    metadata.evaluator_type = "mine"
    found = DefaultRecordCheck(make())
    found.look_at_test(NAME, [record(thing(), image_id="whatever it compares")])
    assert found.errors == []


def test_objects_beyond_what_is_counted(metadata):
    crowded = record(*[thing()] * 4, number=5)
    (line,) = evaluation(metadata, [record(), crowded], "TEST.DETECTIONS_PER_IMAGE", 3).warnings
    assert "5.png has 4 objects, TEST.DETECTIONS_PER_IMAGE is 3" in line


def test_objects_without_masks_pull_the_ap_of_masks(metadata):
    mixed = [record(thing(), thing(segmentation=[]))]
    (line,) = evaluation(metadata, mixed, *MASKS).warnings
    assert "1 of 2 objects have no mask" in line
    assert evaluation(metadata, mixed).warnings == []


def test_a_box_is_needed_where_records_are_converted(metadata):
    records = [record(thing(bbox=None))]
    assert "have no 'bbox' of finite numbers" in evaluation(metadata, records).errors[0]
    assert evaluation(metadata, records, json_file="x.json").errors == []  # the file has its own


@pytest.mark.parametrize(
    ("sigmas", "points", "said"),
    [
        ([], 3, ["TEST.KEYPOINT_OKS_SIGMAS has 17 values"]),
        ([0.1] * 4, 3, ["TEST.KEYPOINT_OKS_SIGMAS has 4 values"]),
        ([0.1] * 3, 3, []),
        ([0.1] * 3, 5, ["objects have [5] keypoints"]),
    ],
)
def test_sigmas_and_keypoints(metadata, sigmas, points, said):
    records = [record(thing(keypoints=[1, 1, 2] * points))]
    found = evaluation(metadata, records, *THREE, "TEST.KEYPOINT_OKS_SIGMAS", sigmas)
    assert len(found.errors) == len(said)
    assert all(part in line for part, line in zip(said, found.errors, strict=True))


# ---- classes by name


@pytest.mark.parametrize(
    ("found", "wanted"), [(["a", "b"], ["a", "b"]), ([], ["a"]), (["a"], []), ([1], ["1"])]
)
def test_classes_that_fit(found, wanted):
    check_same_classes("v", found, "the model", wanted)


@pytest.mark.parametrize(
    ("found", "wanted", "said"),
    [
        (["b", "a"], ["a", "b"], r"'v' has the classes \[b, a\], the model has them in the order"),
        (["a", "c"], ["a", "b"], r"only here \[c\], only there \[b\]"),
        (["a"], ["a", "b"], r"only here \[\], only there \[b\]"),
        (["A", "b"], ["a", "b"], r"only here \[A\], only there \[a\]"),
    ],
)
def test_classes_that_differ(found, wanted, said):
    with pytest.raises(ValueError, match=said):
        check_same_classes("v", found, "the model", wanted)


# ---- judging


@pytest.mark.parametrize(
    ("warmup", "factor", "iterations", "said"),
    [
        (1000, 0.001, 100, "SOLVER.BASE_LR is never reached; set SOLVER.WARMUP_ITERS to about 10"),
        (100, 0.001, 100, "is as long as the whole training"),
        (60, 0.001, 100, "takes more than half"),
        (50, 0.001, 100, ""),
        (1000, 1.0, 100, ""),  # no warm-up
        (1000, 0.001, 0, ""),
    ],
)
def test_the_schedule_is_judged(warmup, factor, iterations, said):
    cfg = make("SOLVER.WARMUP_ITERS", warmup, "SOLVER.WARMUP_FACTOR", factor)
    lines = schedule_warnings(cfg, iterations)
    assert len(lines) == bool(said)
    assert said in "".join(lines)


@pytest.mark.parametrize(
    ("sides", "scale", "small"),
    [
        ([4, 20, 20, 20], 1, 1),
        ([4, 4, 20, 20], 1, 2),
        ([4, 4, 20, 20], 2, 0),  # 8 pixels, as the network sees them, are enough
        ([20] * 20 + [4], 1, 0),  # one of 21
        ([], 1, 0),
    ],
)
def test_small_objects_are_judged_in_the_size_that_the_network_sees(sides, scale, small):
    records = [record(thing(bbox=[0, 0, 30, s]), number=i) for i, s in enumerate(sides)]
    records.append(record(thing(bbox=[0, 0, 1, 1], iscrowd=1), thing(bbox=[9, 9, 1, 1, 30])))
    records.append({"annotations": [thing(bbox=[0, 0, 1, 1])]})  # of unknown size
    chosen = range(len(records))
    lines = object_warnings(make(), records, chosen, lambda h, w: (int(h * scale), int(w * scale)))
    assert len(lines) == bool(small)
    if small:
        assert f"{small} of {len(sides)} objects are less than 8 pixels" in lines[0]


def test_the_trainer_asks_before_it_builds_a_model(tmp_path):
    """The check runs inside `DefaultTrainer`, over the records of training and of test."""
    from tests.support import tiny_run as tiny

    (tmp_path / "images").mkdir()
    found = tiny.records(tmp_path / "images", 3)
    found[1]["annotations"][0]["category_id"] = 4
    DatasetCatalog.data.pop(NAME, None)
    DatasetCatalog.register(NAME, lambda: found)
    MetadataCatalog.get(NAME).thing_classes = ["thing"]
    try:
        cfg = tiny.tiny_cfg(tmp_path / "o", "DATASETS.TRAIN", (NAME,))
        with pytest.raises(ValueError, match=r"category_id"):
            tiny.TinyTrainer(cfg)
    finally:
        DatasetCatalog.data.pop(NAME, None)
        MetadataCatalog.data.pop(NAME, None)
