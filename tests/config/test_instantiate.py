"""`instantiate`: what is called with what, and which names are refused before anything runs."""

import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from d2kit.config import LazyCall, LazyConfig, allow_targets, instantiate
from d2kit.config.instantiate import dump_dataclass, resolve_target, target_name
from d2kit.layers import ShapeSpec
from d2kit.modeling import Backbone
from d2kit.modeling.roi_heads import StandardROIHeads
from tests.support.code import ROOT

DictConfig = pytest.importorskip("omegaconf").DictConfig


def record(**kwargs):
    return kwargs


@dataclasses.dataclass
class Point:
    x: int = 1
    y: Any = None


def test_calls_are_made_innermost_first():
    inner = LazyCall(record)(a=1)
    cfg = LazyCall(record)(inner=inner, many=[inner, 2], pair=(inner, 3), plain={"b": [1]})
    out = instantiate(cfg)
    assert out["inner"] == {"a": 1}
    assert out["many"] == [{"a": 1}, 2]
    assert type(out["many"]) is list
    assert list(out["pair"]) == [{"a": 1}, 3]
    assert out["plain"] == {"b": [1]}
    assert instantiate([inner, inner]) == [{"a": 1}, {"a": 1}]
    cfg.inner.a = 5
    assert instantiate(cfg)["inner"] == {"a": 5}


@pytest.mark.parametrize("value", [3, None, "text", {"a": 1}, [], (), print])
def test_all_else_is_returned_as_it_is(value):
    assert instantiate(value) == value


def test_not_recursive():
    cfg = LazyCall(record)(inner=LazyCall(record)(a=1), _recursive_=False)
    assert instantiate(cfg)["inner"]["_target_"] is record


def test_interpolation():
    cfg = DictConfig({"n": 4, "m": LazyCall(nn.Linear)(in_features="${..n}", out_features=2)})
    assert instantiate(cfg.m).in_features == 4


def test_targets_by_object_and_by_name():
    assert isinstance(instantiate(LazyCall(nn.ReLU)()), nn.ReLU)
    assert isinstance(instantiate(LazyCall("torch.nn.ReLU")()), nn.ReLU)
    assert instantiate({"_target_": "d2kit.layers.ShapeSpec", "channels": 3}) == ShapeSpec(3)
    assert instantiate(LazyCall(lambda x: x + 1)(x=2)) == 3  # an object: code put it there


def test_names_of_the_original_are_looked_up_here():
    assert resolve_target("detectron2.modeling.roi_heads.StandardROIHeads") is StandardROIHeads


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (nn.Conv2d, "torch.nn.Conv2d"),
        (torch.optim.SGD, "torch.optim.SGD"),
        (Backbone, "d2kit.modeling.Backbone"),
        (LazyConfig.load, "d2kit.config.lazy.LazyConfig.load"),
        (print, "builtins.print"),
        ("some.text", "some.text"),
    ],
)
def test_target_name(target, name):
    assert target_name(target) == name


def test_an_object_without_a_name():
    with pytest.raises(ValueError, match="object"):
        target_name(object())


def test_dataclasses():
    point = Point(2, [Point(3), Point(4)])
    dumped = dump_dataclass(point)
    assert dumped == {
        "_target_": "tests.config.test_instantiate.Point",
        "x": 2,
        "y": [
            {"_target_": "tests.config.test_instantiate.Point", "x": x, "y": None} for x in (3, 4)
        ],
    }
    assert instantiate(dumped) == point
    assert instantiate(LazyCall(Point)(x=5)) == Point(5)
    assert instantiate(DictConfig(Point(6))) == Point(6)
    with pytest.raises(TypeError, match="instance of a dataclass"):
        dump_dataclass(Point)


@pytest.mark.parametrize("target", [3, None, ["a"]])
def test_what_cannot_be_a_target(target):
    with pytest.raises(TypeError, match="callable"):
        instantiate({"_target_": target})
    with pytest.raises(TypeError, match="callable"):
        LazyCall(target)


def test_wrong_arguments_name_the_target(caplog):
    with pytest.raises(TypeError):
        instantiate(LazyCall(nn.Linear)(in_feature=1))
    assert "torch.nn.Linear was called with the arguments ['in_feature']" in caplog.text


REFUSED = {
    "os.system": {"command": "touch {mark}"},
    "posix.system": {"command": "touch {mark}"},
    "subprocess.Popen": {"args": ["touch", "{mark}"]},
    "builtins.eval": {"source": "open('{mark}', 'w')"},
    "builtins.exec": {"source": "open('{mark}', 'w')"},
    "eval": {"source": "open('{mark}', 'w')"},
    "antigravity.webbrowser.open": {"url": "http://localhost"},
    "torch.hub.load": {"repo_or_dir": "x/y", "model": "z"},
    "torch.load": {"f": "x"},
    "torch.os.system": {"command": "touch {mark}"},
    "torch.nn.modules.module.torch.hub.load": {"repo_or_dir": "x/y", "model": "z"},
    "torch.utils.data.dataloader.os.system": {"command": "touch {mark}"},
    "torch.utils.data.dataloader.python_multiprocessing.Process": {"target": "x"},
    "torchvision.models._api.importlib.import_module": {"name": "antigravity"},
    "torch.nn.Linear.forward.__globals__.get": {"key": "os"},
    "torch.nn.Module.__init_subclass__": {},
    "d2kit.config.LazyConfig.load": {"filename": "{mark}.py", "trust": True},
    "detectron2.config.LazyConfig.load": {"filename": "{mark}.py", "trust": True},
    "d2kit.config.allow_targets": {"names": "os"},
    "d2kit.modeling.build_model.__wrapped__": {},
    "d2kit.data.common.pickle.loads": {"data": "x"},
    "": {},
}
FORBIDDEN_EVENTS = ("os.system", "os.exec", "os.posix_spawn", "subprocess.", "socket.")

SCRIPT = """
import json, sys
from d2kit.config import instantiate
import d2kit.modeling, d2kit.data, torchvision, torch.utils.data  # what the names lead through
seen = []
def hook(event, args):
    if event.startswith({events!r}) or (event == "open" and "mark" in str(args[0])):
        seen.append(event)
sys.addaudithook(hook)
out = {{}}
for name, kwargs in json.loads(sys.argv[1]).items():
    for nested in (False, True):
        cfg = {{"_target_": name, **kwargs}}
        cfg = {{"_target_": "torch.nn.ReLU", "inplace": [cfg]}} if nested else cfg
        try:
            instantiate(cfg)
            out[name] = "built"
        except (ValueError, ImportError) as error:
            out.setdefault(name, f"{{type(error).__name__}}: {{error}}")
print(json.dumps([out, seen, "antigravity" in sys.modules]))
"""


@pytest.mark.faults(29, fast=True)
def test_hostile_targets_are_refused_and_nothing_runs(tmp_path):
    """FAULTS 29, with an audit hook; in a process of its own, because hooks cannot be removed."""
    mark = tmp_path / "mark"
    (tmp_path / "mark.py").write_text(f"open({str(mark)!r}, 'w')\n")
    cases = json.dumps(REFUSED).replace("{mark}", str(mark))
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(events=FORBIDDEN_EVENTS), cases],
        capture_output=True, text=True, cwd=ROOT, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    out, seen, imported = json.loads(run.stdout)
    assert set(out) == set(REFUSED)
    assert {name: text for name, text in out.items() if "is refused" not in text} == {}
    assert seen == []
    assert not imported
    assert not mark.exists()


def test_allow_targets(monkeypatch):
    module = sys.modules["d2kit.config.instantiate"]
    monkeypatch.setattr(module, "_allowed", set(module.ALLOWED))
    cfg = {"_target_": "fractions.Fraction", "numerator": 3}
    with pytest.raises(ValueError, match=r"allow_targets\('fractions'\)"):
        instantiate(cfg)
    allow_targets("fractions")
    assert instantiate(cfg) == 3
    for bad in ("", "a b", "a."):
        with pytest.raises(ValueError, match="allow_targets expects"):
            allow_targets(bad)


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("torch.nn.Convv2d", ImportError, "Conv2d"),
        ("torch.nn.functional", ValueError, "defined in"),
        ("torch.nn.no_such.Thing", ImportError, "no_such"),
    ],
)
def test_errors_of_names(name, error, words):
    with pytest.raises(error, match=words):
        resolve_target(name)
