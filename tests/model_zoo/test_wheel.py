"""A wheel holds d2kit alone, with configs and data inside, and the command d2kit."""

import json
import os
import shutil
import subprocess
import sys

import pytest

import d2kit
from tests.support.code import ROOT
from tests.support.reference_files import reference_path

pytestmark = pytest.mark.slow

FIND = """
import json, sys
from pathlib import Path
import d2kit
from d2kit import model_zoo
from d2kit.config import LazyConfig, get_cfg
root = Path(sys.argv[1])
assert Path(d2kit.__file__).is_relative_to(root), d2kit.__file__
for name in json.loads(sys.argv[2]):
    assert Path(model_zoo.get_config_file(name)).is_relative_to(root / "d2kit/model_zoo/configs")
    model_zoo.get_config(name)
model_zoo.get_config("new_baselines/mask_rcnn_R_50_FPN_400ep_LSJ.py")
print("found")
"""


def run(*command, **kwargs) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def dist_info(target) -> str:
    (folder,) = target.glob("d2kit-*.dist-info")
    return folder.name


def test_configs_are_found_in_an_installed_wheel(tmp_path):
    pytest.importorskip("setuptools")
    source, target = tmp_path / "source", tmp_path / "target"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("d2kit", "project", "tools", "configs"):
        shutil.copytree(ROOT / folder, source / folder, ignore=ignore)
    for file in ("setup.py", "pyproject.toml", "README.md", "MANIFEST.in"):
        shutil.copy(ROOT / file, source)
    build = "from setuptools import build_meta as b; b.build_sdist('..'); b.build_wheel('..')"
    run(sys.executable, "-c", build, cwd=source)
    wheel = next(tmp_path.glob("d2kit-*.whl"))
    pip = (sys.executable, "-m", "pip", "install", "--no-deps", "--quiet")
    run(*pip, "--target", str(target), str(wheel), cwd=tmp_path)
    names = json.dumps(list(json.loads(reference_path("zoo_configs.json").read_text())))
    environment = {**os.environ, "PYTHONPATH": str(target)}
    out = run(sys.executable, "-c", FIND, str(target), names, cwd=tmp_path, env=environment)
    assert out.strip() == "found"

    assert {path.name for path in target.iterdir()} == {"d2kit", "bin", dist_info(target)}
    assert (target / "d2kit/data/datasets/lvis_categories.json.gz").is_file()
    version = run(str(target / "bin/d2kit"), "--version", cwd=tmp_path, env=environment)
    assert version == f"d2kit {d2kit.__version__}\n"

    archive = next(tmp_path.glob("d2kit-*.tar.gz"))
    unpacked = tmp_path / "unpacked"
    run(sys.executable, "-m", "tarfile", "-e", str(archive), str(unpacked), cwd=tmp_path)
    yaml = sorted(p.name for p in (ROOT / "configs").rglob("*.yaml"))
    assert sorted(p.name for p in unpacked.rglob("configs/**/*.yaml")) == yaml
