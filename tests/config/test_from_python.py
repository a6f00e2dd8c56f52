"""What is set from Python is checked as YAML is; a key twice in YAML is an error."""

import numpy as np
import pytest
import torch

from d2kit.config import get_cfg
from d2kit.config.yaml import parse_yaml


def put(full, value):
    cfg = get_cfg()
    node = cfg
    *sections, last = full.split(".")
    for section in sections:
        node = node[section]
    setattr(node, last, value)
    return node[last]


@pytest.mark.parametrize(
    ("key", "given", "kept"),
    [
        ("SOLVER.BASE_LR", "1e-3", 1e-3),
        ("SOLVER.BASE_LR", 1, 1.0),
        ("SOLVER.BASE_LR", np.float32(0.5), 0.5),
        ("SOLVER.IMS_PER_BATCH", "2", 2),
        ("SOLVER.IMS_PER_BATCH", np.int64(2), 2),
        ("SOLVER.IMS_PER_BATCH", torch.tensor(2), 2),
        ("SOLVER.IMS_PER_BATCH", 2.0, 2),
        ("SOLVER.STEPS", [10, np.int32(20)], (10, 20)),
        ("DATASETS.TRAIN", ["a"], ("a",)),
        ("MODEL.MASK_ON", "True", True),
        ("MODEL.WEIGHTS", "2024", "2024"),
    ],
)
def test_values_are_taken_as_a_file_gives_them(key, given, kept):
    found = put(key, given)
    assert (type(found), found) == (type(kept), kept)


@pytest.mark.parametrize(
    ("key", "given", "words"),
    [
        ("DATASETS.TRAIN", "cars", ["DATASETS.TRAIN", "tuple", "'cars'", "comma"]),
        ("SOLVER.BASE_LR", "fast", ["SOLVER.BASE_LR", "float", "'fast'"]),
        ("SOLVER.IMS_PER_BATCH", 2.5, ["SOLVER.IMS_PER_BATCH", "int", "2.5"]),
        ("SOLVER.IMS_PER_BATCH", None, ["SOLVER.IMS_PER_BATCH", "None"]),
        ("MODEL.PIXEL_MEAN", 103.5, ["MODEL.PIXEL_MEAN", "list", "103.5"]),
        ("MODEL.MASK_ON", 3, ["MODEL.MASK_ON", "bool", "3"]),
    ],
)
def test_values_of_another_type_are_named_with_their_key(key, given, words):
    with pytest.raises(ValueError, match="set from Python") as error:
        put(key, given)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("A: 1\nB: 2\nA: 3\n", "A", (1, 3)),
        ("S:\n  X: 1\n  Y: 2\n  X: 1\n", "X", (2, 4)),
        ("S: {X: 1, X: 2}\n", "X", (1, 1)),
        ("S:\n- {X: 1}\n- X: 1\n  X: 2\n", "X", (3, 4)),
        ("S:\n  X: 1\nT: 1\nS:\n  Y: 1\n", "S", (1, 4)),
    ],
)
def test_a_key_twice_names_both_lines(tmp_path, text, key, lines):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"key '{key}' is said twice") as error:
        get_cfg().merge_from_file(str(path))
    assert str(error.value).startswith(f"{path}:{lines[1]}:")
    assert f"in line {lines[0]} and in line {lines[1]}" in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "S:\n  X: 1\nT:\n  X: 1\n",
        "S: &s\n  X: 1\nT:\n  <<: *s\n  Y: 1\n",
        "S: &s\n  X: 1\nT: &t\n  Y: 1\nU:\n  <<: *s\n  <<: *t\n",
    ],
)
def test_a_key_in_two_sections_and_merged_sections_are_no_doubles(tmp_path, text):
    assert parse_yaml(text, tmp_path / "a.yaml")[0]["S"] == {"X": 1}
