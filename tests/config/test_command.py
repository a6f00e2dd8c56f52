"""explain, diff and print of ``d2kit config`` and ``python -m d2kit.config``."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from d2kit.config import get_cfg
from d2kit.config.command import main, matching_keys
from d2kit.config.keys import KEYS
from d2kit.config.yaml import find_zoo_file
from tests.configs.test_configs import CONFIGS, FILES

REPO = Path(__file__).parents[2]
ZOO = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder, the current one, with a base and a config on it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text("SOLVER:\n  BASE_LR: 0.02\n  MAX_ITER: 7\n")
    (tmp_path / "mine.yaml").write_text("_BASE_: base.yaml\nSOLVER: {MAX_ITER: 9}\nSEED: -1\n")
    return tmp_path


def run(capsys, *words, code=0):
    """Return what a command prints."""
    assert main([str(word) for word in words]) == code
    captured = capsys.readouterr()
    return captured.err if code == 2 else captured.out


def test_explain(place, capsys):
    assert run(capsys, "explain", "SOLVER.MAX_ITER", "SOLVER.OPTIMIZER") == (
        "SOLVER.MAX_ITER: 40000  (int, Detectron2's)\n    Training iterations.\n"
        f"SOLVER.OPTIMIZER: SGD  (str, ours)\n    {KEYS['SOLVER.OPTIMIZER'].meaning}\n"
    )
    keys = ["SOLVER.BASE_LR", "SOLVER.MAX_ITER", "SOLVER.GAMMA", "SEED"]
    opts = ["--config-file", "mine.yaml", "--opts", "SOLVER.MAX_ITER", "3"]
    lines = run(capsys, "explain", *keys, *opts).splitlines()[2::3]
    assert [line.strip() for line in lines] == [
        "here: 0.02, set by base.yaml:2",
        "here: 3, set by the command line",
        "here: 0.1, the default",
        "here: -1, set by mine.yaml:3",
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("SEED", {"SEED"}),
        ("SOLVER.EMA", {f"SOLVER.EMA.{k}" for k in ("ENABLED", "DECAY", "WARMUP")}),
        ("SOLVER.EMA.*", {f"SOLVER.EMA.{k}" for k in ("ENABLED", "DECAY", "WARMUP")}),
        ("*.EMA.DECA?", {"SOLVER.EMA.DECAY"}),
        ("MODEL.RPN", {k for k in KEYS if k.startswith("MODEL.RPN.")}),
    ],
)
def test_what_a_name_means(name, expected):
    assert set(matching_keys(name)) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["explain", "SEED", "SOLVER.MAX_ITERS"], "nearest: SOLVER.MAX_ITER,"),
        (["explain", "SOLVR"], "(nearest: SOLVER)"),
        (["explain", "NUM_CLASSES"], "nearest: MODEL.ROI_HEADS.NUM_CLASSES"),
        (["explain", "SEED", "--opts", "SEED", "1"], "--config-file"),
        (["print", "min.yaml"], "nearest"),
        (["print", "mine.yaml", "SOLVER.MAX_ITR", "1"], "SOLVER.MAX_ITER"),
        (["print", "mine.yaml", "SEED"], "KEY VALUE"),
        (["print", ZOO.replace("rcnn", "rcn")], f"nearest: {ZOO}"),
        (["print", "folder"], "config.yaml"),
        (["print", "program.py"], "is not executed here"),
        (["diff", "mine.yaml", "weights.pth"], "`d2kit config`"),
        (["diff", "mine.yaml", "lazy.yaml"], "lazy"),
        (["print", "broken.yaml"], "broken.yaml:1"),
    ],
)
def test_mistakes_are_one_line_and_code_2(place, capsys, words, expected):
    (place / "folder").mkdir()
    (place / "program.py").write_text("open('executed', 'w')\n")
    (place / "weights.pth").touch()
    (place / "lazy.yaml").write_text("model: {_target_: torch.nn.Conv2d, stride: 1}\n")
    (place / "broken.yaml").write_text("SEED: !!python/name:os.system\n")
    text = run(capsys, *words, code=2)
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    assert expected in text
    assert not (place / "executed").exists()


def test_diff(place, capsys):
    assert run(capsys, "diff", "mine.yaml", "mine.yaml") == ""
    (place / "run").mkdir()
    cfg = get_cfg()
    cfg.merge_from_file("mine.yaml")
    (place / "run/config.yaml").write_text(cfg.dump())
    assert run(capsys, "diff", "mine.yaml", "run") == ""
    assert run(capsys, "diff", ZOO, find_zoo_file(ZOO)) == ""
    text = run(capsys, "diff", "base.yaml", "run", code=1)
    assert text.splitlines()[2:] == ["SOLVER.MAX_ITER  7            9"]
    (place / "other.yaml").write_text("SOLVER: {MAX_ITER: 9, OF_A_PROJECT: [1, 2]}\n")
    rows = run(capsys, "diff", "mine.yaml", "other.yaml", code=1).splitlines()[2:]
    assert rows == [
        "SOLVER.BASE_LR       0.02           0.001",
        "SOLVER.OF_A_PROJECT  (no such key)  [1, 2]",
    ]


def test_diff_of_version_1_and_lazy_configs(place, capsys):
    (place / "old.yaml").write_text(
        "MODEL: {WEIGHT: a.pkl, RPN: {ANCHOR_SIZES: [8, 16]}}\nTEST: {AUG_ON: true}\n"
    )
    (place / "new.yaml").write_text(
        "MODEL: {WEIGHTS: a.pkl, ANCHOR_GENERATOR: {SIZES: [[8, 16]]}}\n"
        "TEST: {AUG: {ENABLED: true}}\nVERSION: 2\n"
    )
    assert run(capsys, "diff", "old.yaml", "new.yaml") == ""
    text = run(capsys, "print", "--changed", "old.yaml")
    assert "SIZES: [[8, 16]]  # old.yaml:1\n" in text
    assert "ENABLED: true  # old.yaml:2\n" in text
    (place / "a.yaml").write_text("model: {_target_: torch.nn.Conv2d, stride: 1}\n")
    (place / "b.yaml").write_text("model: {_target_: torch.nn.Conv2d, stride: 2}\n")
    rows = run(capsys, "diff", "a.yaml", "b.yaml", code=1).splitlines()[2:]
    assert [row.split() for row in rows] == [["model.stride", "1", "2"]]


def test_print(place, capsys):
    assert run(capsys, "print", "--changed", "mine.yaml") == (
        "SOLVER:\n  MAX_ITER: 9  # mine.yaml:2\n  BASE_LR: 0.02  # base.yaml:2\n"
    )
    expected = get_cfg()
    expected.merge_from_file("mine.yaml")
    expected.SEED = -5
    words = ["print", "mine.yaml", "SEED", "-5"]
    assert run(capsys, *words) == expected.dump()
    plain = json.loads(json.dumps(expected))
    assert json.loads(run(capsys, *words, "--json")) == plain
    changed = {"SOLVER": {"MAX_ITER": 9, "BASE_LR": 0.02}, "SEED": -5}
    for order in (["print", "--changed", "--json", *words[1:]], [*words[:2], "--changed"]):
        tail = words[2:] + ["--json"] if "--json" not in order else []
        assert json.loads(run(capsys, *order, *tail)) == changed
    (place / "empty.yaml").touch()
    assert run(capsys, "print", "--changed", "empty.yaml") == "{}\n"


@pytest.mark.parametrize("file", FILES[:: len(FILES) // 10])
def test_what_print_changed_writes_reads_back(file, capsys, tmp_path):
    expected = get_cfg()
    expected.merge_from_file(str(CONFIGS / file))
    again = tmp_path / "again.yaml"
    again.write_text(run(capsys, "print", CONFIGS / file, "--changed"))
    cfg = get_cfg()
    cfg.merge_from_file(str(again))
    assert cfg == expected


@pytest.mark.slow
def test_script_reads_checkpoints(place):
    cfg = get_cfg()
    cfg.merge_from_file("mine.yaml")
    torch.save({"model": {"w": torch.zeros(1)}, "config": {"yaml": cfg.dump()}}, "a.pth")
    torch.save({"model": {"w": torch.zeros(1)}}, "b.pth")
    command = [sys.executable, str(REPO / "tools/config.py"), "diff", "a.pth"]
    codes = [
        subprocess.run([*command, other], capture_output=True, text=True, timeout=60, check=False)
        for other in ("mine.yaml", "b.pth")
    ]
    assert (codes[0].returncode, codes[0].stdout) == (0, "")
    assert codes[1].returncode == 2
    assert "b.pth records no config" in codes[1].stderr
