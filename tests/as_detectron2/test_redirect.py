"""Code written for Detectron2 runs on d2kit; each case in a process of its own."""

import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

from d2kit.as_detectron2.redirect import ABSENT, ABSENT_NAMES

ROOT = Path(__file__).parents[2]


def run(code, *arguments, path="", **environment):
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    env["PYTHONPATH"] = os.pathsep.join(p for p in (path, str(ROOT)) if p)
    return subprocess.run(
        [sys.executable, *arguments, *(("-c", code) if code else ())],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=env,
        cwd=path or ROOT,
    )


USER_CODE = """
import sys
import detectron2
from detectron2 import model_zoo
from detectron2.config import CfgNode as CN, get_cfg
from detectron2.config.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultPredictor, DefaultTrainer, HookBase
from detectron2.engine.defaults import _highlight
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers, FastRCNNOutputs
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.visualizer import ColorMode, Visualizer
import detectron2.data.transforms as T
import detectron2.utils.comm as comm

import d2kit.config, d2kit.structures, d2kit.engine
assert get_cfg is d2kit.config.get_cfg and Boxes is d2kit.structures.Boxes
assert DefaultTrainer is d2kit.engine.DefaultTrainer and CN is CfgNode
assert detectron2.config is d2kit.config and comm is sys.modules["d2kit.utils.comm"]
assert d2kit.config.__spec__.name == "d2kit.config", "the real module is left as it is"
cfg = get_cfg()
cfg.merge_from_file(model_zoo.get_config_file("COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml"))
assert detectron2.__version__ == "0.6"
print("ran", *sys.argv[1:])
"""


def test_a_script_runs_with_its_arguments(tmp_path):
    script = tmp_path / "script.py"
    (tmp_path / "helper.py").write_text("NAME = 'beside it'")
    script.write_text("from helper import NAME\nprint(NAME)\n" + USER_CODE)
    done = run("", "-m", "d2kit.as_detectron2", str(script), "--flag", "value")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["beside it", "ran --flag value"]


def test_import_does_the_same():
    done = run("import d2kit.as_detectron2\n" + USER_CODE)
    assert done.returncode == 0, done.stderr


def test_without_it_there_is_no_detectron2():
    done = run("import d2kit\nimport detectron2")
    assert "No module named 'detectron2'" in done.stderr


LEFT_OUT = (
    "_C.nms_rotated",
    "export.caffe2_modeling.Caffe2MetaArch",
    "export.Caffe2Tracer",
    "export.scripting_with_instances",
    "export.torchscript_patch.patch_builtin_len",
    "export.shared.get_pb_arg_vali",
    "modeling.MMDetBackbone",
    "modeling.mmdet_wrapper.MMDetDetector",
)
CALLS = f"""
import d2kit.as_detectron2, importlib
for name in {LEFT_OUT}:
    module, _, symbol = name.rpartition(".")
    it = getattr(importlib.import_module("detectron2." + module), symbol)
    own = type("Own", (it,), {{}})
    for call in (lambda: it(None), own):
        try:
            call()
        except NotImplementedError as error:
            print(error)
"""


def test_what_is_left_out_is_a_name_that_says_why_when_called():
    done = run(CALLS)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "does not exist under d2kit" in line]
    assert len(lines) == 2 * len(LEFT_OUT)
    for name, line in zip(LEFT_OUT, lines[::2], strict=True):
        assert line.startswith(f"detectron2.{name} does not exist under d2kit")


def test_a_module_that_nobody_has_is_not_found():
    done = run("import d2kit.as_detectron2\nimport detectron2.nowhere")
    assert "No module named 'detectron2.nowhere'" in done.stderr


@pytest.mark.parametrize("path", [*ABSENT, *ABSENT_NAMES])
def test_what_is_there_by_now_is_not_left_out(path):
    with pytest.raises((AttributeError, ImportError)):
        pkgutil.resolve_name(f"d2kit.{path}")


PROJECTS = """
import d2kit.as_detectron2, detectron2.projects, d2kit.contrib, importlib.util
from detectron2.projects import point_rend
from detectron2.projects.deeplab.semantic_seg import DeepLabV3PlusHead
import detectron2.projects.panoptic_deeplab as panoptic
assert point_rend is d2kit.contrib.point_rend and detectron2.projects is d2kit.contrib
assert DeepLabV3PlusHead is d2kit.contrib.deeplab.DeepLabV3PlusHead
assert panoptic is d2kit.contrib.panoptic_deeplab
assert importlib.util.find_spec("detectron2.projects.nowhere") is None
from d2kit.config.instantiate import resolve_target
assert resolve_target("detectron2.projects.point_rend.PointRendMaskHead")
"""


def test_projects_are_those_of_contrib():
    done = run(PROJECTS)
    assert done.returncode == 0, done.stderr


IMPORTED_SUBMODULES = """
import logging, importlib, importlib.metadata, importlib.util, pkgutil, types
early = logging.getLogger("detectron2.early")
import d2kit.as_detectron2, d2kit
pairs = []
modules = [info.name for info in pkgutil.walk_packages(d2kit.__path__, "d2kit.")]
for path in modules + [f"d2kit.{old}" for old in d2kit.MOVED]:
    parent, _, name = path.rpartition(".")
    if "._" in path or parent == "d2kit" or "as_detectron2" in parent:
        continue
    place = importlib.import_module(parent.replace("d2kit", "detectron2"))
    before = getattr(place, name, None)
    if before is not None and not isinstance(before, types.ModuleType):
        module = importlib.import_module(path.replace("d2kit", "detectron2"))
        assert getattr(place, name) is before, path
        assert isinstance(module, types.ModuleType)
        pairs.append(path)
assert "d2kit.layers.roi_align" in pairs and "d2kit.engine.launch" in pairs, pairs
assert "d2kit.layers.roi_align_rotated" in pairs, pairs
assert importlib.metadata.version("detectron2") == "0.6"
assert importlib.util.find_spec("detectron2") is not None
assert importlib.util.find_spec("detectron2.layers") is not None
from detectron2.utils.logger import setup_logger
log = setup_logger()
logging.getLogger("detectron2").info("one")
logging.getLogger("detectron2.trainer").info("two")
early.info("three")
logging.getLogger("detectron2").setLevel(logging.ERROR)
logging.getLogger("d2kit.engine").info("muted")
"""


def test_submodules_keep_functions_and_probes_are_answered():
    done = run(IMPORTED_SUBMODULES)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    assert [line.split()[-1] for line in lines] == ["one", "two", "three"]


@pytest.fixture
def original(tmp_path):
    (tmp_path / "detectron2").mkdir()
    (tmp_path / "detectron2/__init__.py").write_text("__version__ = 'the original'")
    return str(tmp_path)


def test_an_installed_original_stops_it(original):
    done = run("import d2kit.as_detectron2", path=original)
    assert "the original detectron2 is installed" in done.stderr
    assert "D2KIT_AS_DETECTRON2=d2kit" in done.stderr


@pytest.mark.parametrize(("choice", "version"), [("d2kit", "0.6"), ("original", "the original")])
def test_the_choice_is_the_users(original, choice, version):
    code = "import d2kit.as_detectron2, detectron2; print(detectron2.__version__)"
    done = run(code, path=original, D2KIT_AS_DETECTRON2=choice)
    assert done.stdout.strip() == version, done.stderr


def test_an_imported_original_and_a_wrong_choice_are_errors(original):
    done = run("import detectron2, d2kit.as_detectron2", path=original, D2KIT_AS_DETECTRON2="d2kit")
    assert "is imported already" in done.stderr
    done = run("import d2kit.as_detectron2", D2KIT_AS_DETECTRON2="yes")
    assert "expected 'd2kit' or 'original', got 'yes'" in done.stderr


def test_every_test_that_compatibility_names_exists():
    for line in (ROOT / "COMPATIBILITY.md").read_text(encoding="utf-8").splitlines():
        path = ""
        for file, name in re.findall(r"`(tests/[\w/.]*)?(?:::(\w+))?`", line):
            path = file or path
            if not path:
                continue
            assert (ROOT / path).exists(), line
            if name:
                text = (ROOT / path).read_text(encoding="utf-8")
                assert re.search(rf"(def|class) {name}\b", text), f"{path}::{name}"


def test_every_difference_names_a_test():
    text = (ROOT / "COMPATIBILITY.md").read_text(encoding="utf-8")
    tables = text.split("| difference | why | test |\n|---|---|---|\n")[1:]
    rows = [row for table in tables for row in table.split("\n\n")[0].splitlines()]
    assert len(rows) > 60
    assert [row for row in rows if "`tests/" not in row and not row.endswith("| the same |")] == []
