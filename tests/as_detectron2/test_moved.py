"""Modules of Detectron2 that are part of a larger file here: their paths lead to that file."""

import importlib
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import d2kit
from d2kit import MOVED, RENAMED

ROOT = Path(d2kit.__file__).parent


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_the_old_path_is_the_module(old, new):
    home = importlib.import_module(f"d2kit.{new}")
    assert importlib.import_module(f"d2kit.{old}") is home
    assert home.__name__ == home.__spec__.name == f"d2kit.{new}"
    assert not (ROOT / f"{old.replace('.', '/')}.py").exists(), "a file that nobody could import"


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_a_renamed_package_brings_its_modules(old, new):
    assert not (ROOT / old).exists()
    for path in (ROOT / new).rglob("*.py"):
        tail = ".".join(path.relative_to(ROOT / new).with_suffix("").parts).removesuffix("__init__")
        name = f"{new}.{tail}".strip(".")
        found = importlib.import_module(f"d2kit.{old}.{tail}".strip("."))
        assert found is importlib.import_module(f"d2kit.{name}")
    assert importlib.import_module("d2kit.projects.deeplab.loss").DeepLabCE


def test_a_moved_path_replaces_no_object_of_its_package():
    code = """
import importlib, types, d2kit
for old in d2kit.MOVED:
    place, _, name = old.rpartition(".")
    package = importlib.import_module(f"d2kit.{place}".rstrip("."))
    before = getattr(package, name, None)
    importlib.import_module(f"d2kit.{old}")
    if before is not None and not isinstance(before, types.ModuleType):
        assert getattr(package, name) is before, old
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_classes_are_the_same_under_every_name():
    from d2kit import tracking
    from d2kit.tracking.bbox_iou_tracker import BBoxIOUTracker

    assert BBoxIOUTracker is tracking.BBoxIOUTracker
    pickled = b"cd2kit.tracking.bbox_iou_tracker\nBBoxIOUTracker\n."
    assert pickle.loads(pickled) is BBoxIOUTracker
    assert pickle.loads(pickle.dumps(BBoxIOUTracker)) is BBoxIOUTracker


@pytest.mark.parametrize("name", ["tracking.nowhere", "projects.nowhere", "utils.tracing.nowhere"])
def test_what_nobody_has_is_not_found(name):
    with pytest.raises(ModuleNotFoundError, match="nowhere"):
        importlib.import_module(f"d2kit.{name}")


AS_DETECTRON2 = """
import d2kit.as_detectron2, pickle
import detectron2.engine, detectron2.tracking
assert detectron2.engine.defaults.DefaultTrainer is detectron2.engine.DefaultTrainer
assert detectron2.engine.train_loop.HookBase is detectron2.engine.HookBase
from detectron2.tracking.bbox_iou_tracker import BBoxIOUTracker
from detectron2.utils.visualizer import Visualizer, _create_text_labels
import d2kit.tracking, d2kit.visualization
assert BBoxIOUTracker is d2kit.tracking.BBoxIOUTracker
assert detectron2.tracking.bbox_iou_tracker.BBoxIOUTracker is BBoxIOUTracker
assert Visualizer is d2kit.visualization.Visualizer
assert pickle.loads(b"cdetectron2.structures.boxes\\nBoxes\\n.") is d2kit.structures.Boxes
"""


def test_the_original_name_leads_there_too():
    done = subprocess.run(
        [sys.executable, "-c", AS_DETECTRON2],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT.parent,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
