"""Keypoints by the config alone: names, pairs, and what is said where they are missing."""

import pytest

from d2kit.config import get_cfg
from d2kit.data import MetadataCatalog
from d2kit.data.dataset_mapper import build_keypoint_flips, pairs_by_name

NAME = "zz_keypoints_by_config"
FACE = ["nose", "left_eye", "right_eye"]


@pytest.fixture
def metadata():
    yield MetadataCatalog.get(NAME)
    MetadataCatalog.data.pop(NAME, None)


def flips(*options, count=3):
    cfg = get_cfg()
    given = ["DATASETS.TRAIN", (NAME,), "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", count]
    cfg.merge_from_list([*given, *options])
    return build_keypoint_flips(cfg)


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        (FACE, [("left_eye", "right_eye")]),
        (["L-ear", "R-ear"], [("L-ear", "R-ear")]),
        (["left knee", "right knee", "left_hip"], [("left knee", "right knee")]),
        (["lear", "rear"], []),  # no word of its own
        (["a", "b"], []),
    ],
)
def test_pairs_that_the_names_tell(names, pairs):
    assert pairs_by_name(names) == pairs


def test_names_of_the_config_become_metadata(metadata):
    assert flips("DATASETS.KEYPOINT_NAMES", FACE) == [0, 2, 1]
    assert list(metadata.keypoint_names) == FACE


def test_pairs_of_the_config_win_over_those_of_the_names(metadata):
    given = ("DATASETS.KEYPOINT_NAMES", FACE, "DATASETS.KEYPOINT_FLIP_MAP", [["nose", "left_eye"]])
    assert flips(*given) == [1, 0, 2]


def test_one_keypoint_twice_says_that_none_change_places(metadata):
    names = ("DATASETS.KEYPOINT_NAMES", ["a", "b", "c"])
    assert flips(*names, "DATASETS.KEYPOINT_FLIP_MAP", [["a", "a"]]) == [0, 1, 2]


def test_names_of_the_annotation_file_are_enough(metadata):
    metadata.keypoint_names = FACE
    assert flips() == [0, 2, 1]


def test_without_mirroring_nothing_is_asked(metadata):
    assert flips("INPUT.RANDOM_FLIP", "none") is None


@pytest.mark.parametrize(
    ("options", "count", "said"),
    [
        ((), 3, "DATASETS.KEYPOINT_NAMES"),
        (("DATASETS.KEYPOINT_NAMES", ["a", "b", "c"]), 3, "DATASETS.KEYPOINT_FLIP_MAP"),
        (("DATASETS.KEYPOINT_NAMES", FACE), 4, "has 3 keypoints .*NUM_KEYPOINTS is 4"),
        (
            ("DATASETS.KEYPOINT_NAMES", FACE, "INPUT.RANDOM_FLIP", "none"),
            4,
            "has 3 keypoints .*NUM_KEYPOINTS is 4",
        ),
    ],
)
def test_what_is_missing_is_said(metadata, options, count, said):
    with pytest.raises(ValueError, match=said):
        flips(*options, count=count)
