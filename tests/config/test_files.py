import os
import socket
import sys

import pytest

from d2kit.config import CfgNode, downgrade_config, get_cfg, upgrade_config
from d2kit.config.yaml import find_zoo_file


@pytest.fixture
def write(tmp_path):
    def write_file(name, text):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        return str(file)

    return write_file


def merged(file):
    cfg = get_cfg()
    cfg.merge_from_file(file)
    return cfg


def test_bases_are_merged_under_the_file(write):
    write("configs/base.yaml", "SOLVER: {BASE_LR: 1, MAX_ITER: 7}\nMODEL: {MASK_ON: true}\n")
    write("configs/second.yaml", "SOLVER:\n  MAX_ITER: 8\n")
    file = write(
        "configs/sub/a.yaml", "_BASE_: [../base.yaml, ../second.yaml]\nSOLVER: {BASE_LR: 2.5}\n"
    )
    cfg = merged(file)
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER, cfg.MODEL.MASK_ON) == (2.5, 8, True)
    assert CfgNode.load_yaml_with_base(file) == {
        "SOLVER": {"BASE_LR": 2.5, "MAX_ITER": 8},
        "MODEL": {"MASK_ON": True},
    }


def test_base_of_the_repository_that_a_project_lives_in(write):
    write("configs/base.yaml", "SEED: 3\n")
    file = write("projects/mine/configs/a.yaml", "_BASE_: ../../../configs/base.yaml\n")
    assert merged(file).SEED == 3


def test_base_of_the_model_zoo_by_its_name(write, tmp_path):
    zoo = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
    file = write("cats/mine.yaml", f"_BASE_: {zoo}\nSEED: 3\n")
    expected = merged(find_zoo_file(zoo))
    expected.SEED = 3
    assert merged(file) == expected
    write(f"cats/{zoo}", "SEED: 4\n")  # the user's own file comes first
    write("cats/mine.yaml", f"_BASE_: {zoo}\n")
    assert merged(file).SEED == 4
    wrong = write("cats/wrong.yaml", "_BASE_: ../COCO-Detection/retinanet_R_50_FPN_1x.yaml\n")
    with pytest.raises(ValueError, match="outside of the config tree"):
        merged(wrong)
    assert find_zoo_file("../setup.py") is None
    assert find_zoo_file(str(find_zoo_file(zoo))) is None


def test_values_of_yaml(write):
    file = write(
        "a.yaml",
        "SOLVER:\n  BASE_LR: 1e-3\n  STEPS: [1, 2]\n  WEIGHT_DECAY_BIAS: 0\n"
        "DATASETS:\n  TRAIN: ('x',)\nMODEL:\n  RPN:\n    IN_FEATURES: ['p2']\n",
    )
    cfg = merged(file)
    assert cfg.SOLVER.BASE_LR == 0.001
    assert cfg.SOLVER.STEPS == (1, 2)
    assert cfg.DATASETS.TRAIN == ("x",)
    assert cfg.MODEL.RPN.IN_FEATURES == ["p2"]


def test_empty_file(write):
    assert merged(write("a.yaml", "")) == get_cfg()


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("SOLVER:\n  BASE_LRR: 1\n", KeyError, ["a.yaml:2", "SOLVER.BASE_LRR", "SOLVER.BASE_LR"]),
        ("SOLVER:\n  BASE_LR: [1\n", ValueError, ["a.yaml:3", "malformed"]),
        ("SOLVER:\n\tBASE_LR: 1\n", ValueError, ["a.yaml:2", "malformed"]),
        ("a: b: c\n", ValueError, ["a.yaml:1", "malformed"]),
        ("- 1\n- 2\n", ValueError, ["a.yaml", "list"]),
        ("just text\n", ValueError, ["a.yaml", "str"]),
        ("SOLVER:\n  BASE_LR: x\n", ValueError, ["a.yaml:2", "SOLVER.BASE_LR", "float"]),
        ("SOLVER: 3\n", ValueError, ["a.yaml:1", "SOLVER", "section"]),
        ("SEED:\n  A: 3\n", ValueError, ["a.yaml:1", "SEED", "section"]),
        ("OUTPUT_DIR: 2024-01-01\n", ValueError, ["a.yaml:1", "OUTPUT_DIR", "date"]),
        ("1: 2\n", ValueError, ["a.yaml:1", "not a name"]),
        ("VERSION: 7\n", ValueError, ["a.yaml", "VERSION", "7"]),
        ("_BASE_: http://localhost/x.yaml\n", ValueError, ["a.yaml:1", "not a local path"]),
        ("_BASE_: s3://bucket/x.yaml\n", ValueError, ["a.yaml:1", "not a local path"]),
        ("_BASE_: ../x.yaml\n", ValueError, ["a.yaml:1", "outside", "configs"]),
        ("_BASE_: ~/x.yaml\n", ValueError, ["a.yaml:1", "outside"]),
        ("_BASE_: /etc/passwd\n", ValueError, ["a.yaml:1", "outside"]),
        ("_BASE_: a.yaml\n", ValueError, ["circle"]),
        ("_BASE_: 3\n", ValueError, ["a.yaml:1", "path"]),
        ("_BASE_: aa.yaml\n", FileNotFoundError, ["aa.yaml", "nearest there: a.yaml"]),
        ("_BASE_: no/where.yaml\n", FileNotFoundError, ["where.yaml", "no folder"]),
    ],
)
def test_bad_files(write, text, error, words):
    file = write("configs/a.yaml", text)
    cfg = get_cfg()
    with pytest.raises(error) as caught:
        cfg.merge_from_file(file)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert cfg == get_cfg()


def test_the_file_with_the_bad_key_is_named_not_the_one_that_was_read(write):
    write("configs/base.yaml", "MODEL:\n  MASK_ON: true\n  NOPE: 1\n")
    file = write("configs/a.yaml", "_BASE_: base.yaml\nSEED: 1\n")
    with pytest.raises(KeyError, match=r"base\.yaml:3"):
        merged(file)


def test_circle_of_two(write):
    write("a.yaml", "_BASE_: b.yaml\n")
    with pytest.raises(ValueError, match=r"circle.*a\.yaml.*b\.yaml"):
        merged(write("b.yaml", "_BASE_: a.yaml\n"))


def test_a_section_cannot_replace_a_value_of_the_base(write):
    write("b.yaml", "SEED: 1\n")
    with pytest.raises(ValueError, match=r"a\.yaml:2: SEED.*b\.yaml:1"):
        merged(write("a.yaml", "_BASE_: b.yaml\nSEED:\n  X: 1\n"))


def test_missing_file_names_the_nearest(write):
    file = write("mask_rcnn.yaml", "")
    with pytest.raises(FileNotFoundError, match=r"nearest there: mask_rcnn\.yaml"):
        merged(file.replace("mask_rcnn", "mask_rcn"))
    with pytest.raises(IsADirectoryError):
        merged(file.rpartition("/")[0])
    with pytest.raises(ValueError, match="URL"):
        merged("https://localhost/a.yaml")


@pytest.mark.faults(29, fast=True)
def test_symbolic_link_out_of_the_tree_is_refused(write, tmp_path):
    outside = write("outside.yaml", "SEED: 1\n")
    file = write("configs/a.yaml", "_BASE_: link.yaml\n")
    (tmp_path / "configs/link.yaml").symlink_to(outside)
    with pytest.raises(ValueError, match="outside"):
        merged(file)


@pytest.mark.faults(29, fast=True)
@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.system ['echo hacked > {mark}']",
        "!!python/object/new:subprocess.Popen [['touch', '{mark}']]",
        "!!python/name:os.system",
        '!!python/object/apply:eval [\'open("{mark}", "w")\']',
        "!unknown 3",
    ],
)
@pytest.mark.parametrize("allow_unsafe", [True, False])
def test_tags_are_refused_and_nothing_runs(write, tmp_path, value, allow_unsafe):
    mark = tmp_path / "mark"
    file = write("a.yaml", "SEED: 1\nOUTPUT_DIR: " + value.replace("{mark}", str(mark)))
    cfg = get_cfg()
    with pytest.raises(ValueError, match=r"a\.yaml:2.*nothing in them is executed"):
        cfg.merge_from_file(file, allow_unsafe=allow_unsafe)
    assert not mark.exists()
    assert cfg == get_cfg()


@pytest.mark.faults(29, fast=True)
def test_no_socket_is_opened_for_a_base(write, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    with pytest.raises(ValueError, match="not a local path"):
        merged(write("a.yaml", "_BASE_: https://localhost:1/x.yaml\n"))


def test_not_utf8(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_bytes(b"\xff\xfe\x00binary\x00")
    with pytest.raises(ValueError, match="UTF-8"):
        merged(str(file))


OLD = """
MODEL:
  META_ARCHITECTURE: RetinaNet
  WEIGHT: x.pkl
  RETINANET: {INFERENCE_SCORE_THRESHOLD: 0.25, ANCHOR_SIZES: [16, 32]}
  RPN: {ANCHOR_SIZES: [1]}
  PANOPTIC_FPN: {COMBINE_ON: false}
TEST: {AUG_ON: true, DETECTIONS_PER_IMG: 7}
"""


@pytest.mark.parametrize("version", ["", "VERSION: 1\n"])
def test_old_files_are_converted(write, version):
    cfg = merged(write("a.yaml", version + OLD))
    assert cfg.VERSION == 2
    assert cfg.MODEL.WEIGHTS == "x.pkl"
    assert cfg.MODEL.RETINANET.SCORE_THRESH_TEST == 0.25
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES == [[16, 32]]
    assert cfg.MODEL.PANOPTIC_FPN.COMBINE.ENABLED is False
    assert cfg.TEST.AUG.ENABLED is True
    assert cfg.TEST.DETECTIONS_PER_IMAGE == 7


def test_old_names_in_a_new_file_are_unknown(write):
    with pytest.raises(KeyError, match=r"MODEL\.WEIGHTS"):
        merged(write("a.yaml", "VERSION: 2\nMODEL: {WEIGHT: x}\n"))


def test_versions_there_and_back():
    cfg = get_cfg()
    cfg.MODEL.WEIGHTS = "x"
    old = downgrade_config(cfg, 1)
    assert (old.VERSION, old.MODEL.WEIGHT, old.TEST.AUG_ON) == (1, "x", False)
    assert "WEIGHTS" not in old.MODEL
    assert old.MODEL.RPN.ANCHOR_SIZES == cfg.MODEL.ANCHOR_GENERATOR.SIZES
    assert upgrade_config(old) == cfg
    assert upgrade_config(cfg) == cfg
    assert cfg.MODEL.WEIGHTS == "x"
    for bad in (lambda: upgrade_config(cfg, 3), lambda: downgrade_config(old, 2)):
        with pytest.raises(ValueError, match="version"):
            bad()


def test_yaml_is_not_left_open(write, recwarn):
    merged(write("a.yaml", "SEED: 1\n"))
    assert not [w for w in recwarn if issubclass(w.category, ResourceWarning)]
    assert "yaml" in sys.modules


def test_a_pipe_is_no_config(tmp_path):
    """Opening one would wait for ever."""
    path = tmp_path / "a.yaml"
    os.mkfifo(path)
    with pytest.raises(ValueError, match="is a pipe or device"):
        get_cfg().merge_from_file(str(path))
