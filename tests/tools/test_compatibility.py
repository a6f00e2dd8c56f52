"""The table of other people's code: what works, what fails, and that nothing stops it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

TINY = """
MODEL:
  META_ARCHITECTURE: RetinaNet
  OWN: {SIZE: 3}
  BACKBONE: {NAME: build_retinanet_resnet_fpn_backbone}
  RESNETS: {DEPTH: 18, RES2_OUT_CHANNELS: 64, OUT_FEATURES: [res3, res4, res5]}
  ANCHOR_GENERATOR: {SIZES: [[32], [64], [128], [256], [512]]}
  FPN: {IN_FEATURES: [res3, res4, res5], OUT_CHANNELS: 8}
  RETINANET: {NUM_CLASSES: 2, NUM_CONVS: 1}
"""


@pytest.fixture
def repo(tmp_path):
    (tmp_path / "repo/own").mkdir(parents=True)
    files = {
        "LICENSE": "MIT License",
        "own/__init__.py": "",
        "own/config.py": "from detectron2.config import CfgNode as CN\n"
        "def add_own_config(cfg):\n    cfg.MODEL.OWN = CN({'SIZE': 1})\n",
        "own/crash.py": "import detectron2, os\nos.abort()\n",
        "own/exits.py": "import detectron2\nraise SystemExit('usage')\n",
        "own/missing.py": "import detectron2.layers, surely_not_installed\n",
        "own/endless.py": "import detectron2\nwhile True: pass\n",
        "own/good.py": "from detectron2.modeling import build_model\n",
        "good.yaml": TINY,
        "bad.yaml": "MODEL: {NO_SUCH_KEY_AT_ALL: 1}\n",
        "wrong.yaml": TINY + "  PIXEL_MEAN: [1.0]\n",
        "other.yaml": "jobs: 1\n",
    }
    for name, text in files.items():
        (tmp_path / "repo" / name).write_text(text)
    return tmp_path / "repo"


@pytest.mark.slow
def test_every_stage_is_counted_and_nothing_stops_it(repo, tmp_path):
    failures = tmp_path / "failures.tsv"
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/compatibility.py"), str(repo)]
        + ["--limit", "20", "--failures", str(failures)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 1, done.stderr
    row = [part.strip() for part in done.stdout.splitlines()[2].strip("| ").split("|")]
    assert row == ["repo", "MIT", "2/5", "2/3", "1/2", "1/1", "1/1", "surely_not_installed"]
    assert len(done.stdout.splitlines()) == 3
    told = {tuple(line.split("\t")[1:3]): line for line in failures.read_text().splitlines()}
    assert "ended by itself" in told["imports", "own/crash.py"]
    assert "SystemExit: usage" in told["imports", "own/exits.py"]
    assert "longer than 20 s" in told["imports", "own/endless.py"]
    assert "NO_SUCH_KEY_AT_ALL" in told["configs", "bad.yaml"]
    assert ("builds", "wrong.yaml") in told
