"""Lazy configs: what is executed and what is not, imports, text and back, overrides."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from d2kit.config import LazyCall, LazyConfig, instantiate, trust_configs
from d2kit.config import lazy as _lazy_files
from d2kit.config.yaml import zoo_folder
from d2kit.layers import ShapeSpec
from tests.config import lazy_caller

DictConfig = pytest.importorskip("omegaconf").DictConfig


@pytest.fixture
def tree(tmp_path):
    """Configs that import each other, and a mark that one of them leaves when it runs."""
    files = {
        "common/optim.py": "sgd = dict(lr=0.1, momentum=0.9)\nNUMBER = 3\n_private = dict(a=1)\n",
        "common/deep/model.py": (
            "import torch\nfrom ..optim import sgd\n"
            "from d2kit.config import LazyCall as L\n"
            "model = L(torch.nn.Linear)(in_features=2, out_features=4)\nsgd.lr = 5\n"
        ),
        "zoo-1.0/base.py": (
            "from ..common.optim import sgd as optimizer, NUMBER\n"
            "from ..common.deep.model import model\n"
            "optimizer.lr *= 2\nmodel.out_features = NUMBER\n"
            "train = dict(max_iter=10, amp=dict(enabled=False))\n"
            "sizes = [1, 2]\n"
            "def helper():\n    from ..common.optim import sgd\n    return sgd.momentum\n"
            "train['momentum'] = helper()\n"
        ),
        "zoo-1.0/child.py": "from .base import *\ntrain.max_iter = 20\n",
        "zoo-1.0/both.py": "from . import base, child\nout = dict(a=base.train, b=child.train)\n",
        "zoo-1.0/circle.py": "from .circle2 import a\n",
        "zoo-1.0/circle2.py": "from .circle import a\n",
        "zoo-1.0/folder.py": "from ..common import optim\n",
        "zoo-1.0/folder2.py": "from ..common.deep import model\n",
        "zoo-1.0/folder3.py": "from ..common.deep.modle import model\n",
        "mark.py": f"open({str(tmp_path / 'mark')!r}, 'w').close()\na = dict(x=1)\n",
    }
    for name, text in files.items():
        file = tmp_path / "lazy" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path / "lazy"


@pytest.fixture
def _no_trust(monkeypatch):
    monkeypatch.setattr(_lazy_files, "_trusted", set())
    monkeypatch.delenv(_lazy_files.VARIABLE, raising=False)


def load(file: Path, keys=None):
    return LazyConfig.load(str(file), keys, trust=True)


@pytest.mark.usefixtures("_no_trust")
def test_a_file_of_others_is_not_executed(tree):
    file, mark = tree / "mark.py", tree.parent / "mark"
    with pytest.raises(PermissionError, match=r"would execute it.*trust=True.*trust_configs"):
        LazyConfig.load(str(file))
    assert not mark.exists()
    assert LazyConfig.load(str(file), trust=True) == {"a": {"x": 1}}
    assert mark.exists()


@pytest.mark.usefixtures("_no_trust")
@pytest.mark.parametrize("how", ["folder", "file", "variable"])
def test_trust(tree, monkeypatch, how):
    file = tree / "mark.py"
    if how == "variable":
        monkeypatch.setenv(_lazy_files.VARIABLE, f"/nowhere:{tree}")
    else:
        trust_configs(tree if how == "folder" else file)
    assert LazyConfig.load(str(file)).a.x == 1
    (tree.parent / "beside.py").write_text("a = dict(x=2)\n")
    with pytest.raises(PermissionError, match=r"beside\.py"):
        LazyConfig.load(str(tree / "../beside.py"))


@pytest.mark.usefixtures("_no_trust")
def test_a_link_in_a_trusted_folder_does_not_make_its_target_trusted(tree, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "link.py").symlink_to(tree / "mark.py")
    trust_configs(folder)
    with pytest.raises(PermissionError):
        LazyConfig.load(str(folder / "link.py"))
    assert not (tree.parent / "mark").exists()


def test_trust_of_nothing():
    with pytest.raises(FileNotFoundError, match="nowhere"):
        trust_configs("/nowhere")


@pytest.mark.usefixtures("_no_trust")
def test_own_configs_are_trusted():
    file = next(zoo_folder().rglob("*.py"))
    assert LazyConfig.load(str(file))


def test_relative_imports_give_copies(tree):
    cfg = load(tree / "zoo-1.0/base.py")
    assert set(cfg) == {"optimizer", "model", "train", "sizes"}  # no numbers, functions, modules
    assert cfg.optimizer == {"lr": 0.2, "momentum": 0.9}  # deep/model.py changed its own copy
    assert cfg.model.out_features == 3
    assert cfg.train == {"max_iter": 10, "amp": {"enabled": False}, "momentum": 0.9}
    child = load(tree / "zoo-1.0/child.py")
    assert (child.train.max_iter, cfg.train.max_iter) == (20, 10)
    both = load(tree / "zoo-1.0/both.py").out
    assert (both.a.max_iter, both.b.max_iter) == (10, 20)
    assert instantiate(cfg.model).weight.shape == (3, 2)


def test_loading_leaves_no_module_and_no_file_behind(tree):
    before = set(sys.modules), sorted(tree.rglob("*"))
    load(tree / "zoo-1.0/base.py")
    assert (set(sys.modules), sorted(tree.rglob("*"))) == before


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("NUMBER", 3),
        ("sgd", {"lr": 0.1, "momentum": 0.9}),
        ("_private", {"a": 1}),
        (("NUMBER", "sgd"), (3, {"lr": 0.1, "momentum": 0.9})),
    ],
)
def test_keys(tree, keys, expected):
    assert load(tree / "common/optim.py", keys) == expected


@pytest.mark.parametrize(
    ("file", "keys", "error", "words"),
    [
        ("zoo-1.0/circle.py", None, ImportError, ["circle.py -> ", "circle2.py -> "]),
        ("zoo-1.0/folder.py", None, ImportError, ["relative import of the folder", "common"]),
        ("zoo-1.0/folder2.py", None, ImportError, ["relative import of the folder", "deep"]),
        ("zoo-1.0/folder3.py", None, ImportError, ["modle.py", "nearest there: model"]),
        ("zoo-1.0/bass.py", None, FileNotFoundError, ["bass.py", "nearest there: base.py"]),
        ("zoo-1.0/base.txt", None, ValueError, [".py or .yaml"]),
        ("common/optim.py", "sdg", KeyError, ["sdg", "nearest: sgd"]),
    ],
)
def test_errors_of_loading(tree, file, keys, error, words):
    with pytest.raises(error) as caught:
        load(tree / file, keys)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_an_error_in_a_config_names_its_line(tree):
    (tree / "bad.py").write_text("a = dict(x=1)\nb = a['y']\n")
    with pytest.raises(KeyError) as caught:
        load(tree / "bad.py")
    last = caught.traceback[-1]
    assert (Path(str(last.path)).name, last.lineno + 1) == ("bad.py", 2)


def test_load_rel():
    assert lazy_caller.load("lazy_example.py").train.max_iter == 3
    assert lazy_caller.load("lazy_example.py", "number") == 7
    with pytest.raises(ValueError, match="relative path"):
        lazy_caller.load("/lazy_example.py")


def example():
    return {
        "model": LazyCall(nn.Sequential)(),
        "conv": LazyCall(nn.Conv2d)(
            in_channels=3, out_channels=4, kernel_size=[3, 1], padding_mode="zeros", device="cpu"
        ),
        "train": {"lr": 1e-4, "steps": [1, 2], "note": "true", "none": None, "twice": "${.lr}"},
    }


def test_yaml_and_back(tmp_path):
    cfg = LazyConfig.load(write(tmp_path, LazyCall(dict)(**example())))
    assert cfg["_target_"] == "builtins.dict"
    assert cfg.conv["_target_"] == "torch.nn.Conv2d"
    assert list(cfg.conv.kernel_size) == [3, 1]
    assert cfg.train.twice == 1e-4
    assert cfg.train.note == "true"
    assert instantiate(cfg.conv).weight.shape == (4, 3, 3, 1)
    assert LazyConfig.load(write(tmp_path, cfg)) == cfg


def write(folder, cfg) -> str:
    file = str(folder / "saved.yaml")
    LazyConfig.save(cfg, file)
    return file


def test_what_yaml_cannot_hold_is_named(tmp_path, caplog):
    cfg = LazyCall(nn.Linear)(
        in_features=1, hook=lambda x: x, where=[torch.device("cpu")], kind=nn.ReLU
    )
    again = LazyConfig.load(write(tmp_path, cfg))
    assert "hook, where[0], kind as text" in caplog.text
    assert again.where == ["device(type='cpu')"]
    assert again.kind == "torch.nn.ReLU"


def test_dataclasses_in_a_config_come_back_from_yaml(tmp_path, caplog):
    cfg = LazyCall(dict)(shape=ShapeSpec(channels=3, stride=4), many=[ShapeSpec(1)])
    again = instantiate(LazyConfig.load(write(tmp_path, cfg)))
    assert again == {"shape": ShapeSpec(channels=3, stride=4), "many": [ShapeSpec(1)]}
    assert caplog.text == ""
    assert "shape=ShapeSpec(channels=3" in LazyConfig.to_py(cfg)


def test_tags_in_yaml_are_refused(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("x: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(ValueError, match="nothing in them is executed"):
        LazyConfig.load(str(file))


def test_to_py():
    text = LazyConfig.to_py(example())
    assert text.splitlines() == [
        "cfg.model = torch.nn.Sequential()",
        "cfg.conv = torch.nn.Conv2d(",
        "    in_channels=3,",
        "    out_channels=4,",
        "    kernel_size=[3, 1],",
        "    padding_mode='zeros',",
        "    device='cpu',",
        ")",
        "cfg.train.lr = 0.0001",
        "cfg.train.steps = [1, 2]",
        "cfg.train.note = 'true'",
        "cfg.train.none = None",
        "cfg.train.twice = '${.lr}'",
    ]
    assert LazyConfig.to_py(LazyCall(nn.ReLU)(), prefix="x.") == "x = torch.nn.ReLU()\n"
    assert LazyConfig.to_py({"a": {"b": {}, "c": (1,)}}, prefix="") == "a.b = {}\na.c = [1]\n"


def test_a_tuple_can_be_replaced_by_a_number():
    cfg = LazyCall(record)(size=(640, 800), inner={"size": (1, 2)})
    cfg.size = 7
    LazyConfig.apply_overrides(cfg, ["inner.size=8"])
    assert instantiate(cfg) == {"size": 7, "inner": {"size": 8}}


def record(**kwargs):
    return kwargs


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("train.lr=1e-3", ("train", "lr"), 1e-3),
        ("train.lr=null", ("train", "lr"), None),
        ("train.note=a=b", ("train", "note"), "a=b"),
        ("train.note=", ("train", "note"), ""),
        ("train.none=true", ("train", "none"), True),
        ("train.steps=[3, x]", ("train", "steps"), [3, "x"]),
        ("train.steps.1=5", ("train", "steps", 1), 5),
        ("train.steps[-1]=6", ("train", "steps", 1), 6),
        ("train.note={a: 1}", ("train", "note"), {"a": 1}),
        ("conv.groups=2", ("conv", "groups"), 2),  # an argument of a call that was not given yet
        ("+train.new.deep=4", ("train", "new", "deep"), 4),
        ("+top='1'", ("top",), "1"),
    ],
)
def test_overrides(override, path, value):
    cfg = LazyCall(dict)(**example())
    assert LazyConfig.apply_overrides(cfg, [override]) is cfg
    for part in path:
        cfg = cfg[part]
    assert cfg == value


@pytest.mark.parametrize(
    ("override", "error", "words"),
    [
        ("train.Ir=1", KeyError, ["no key 'Ir' in 'train'", "known: lr, steps"]),
        ("train.step=1", KeyError, ["no key 'step' in 'train'", "nearest: steps"]),
        ("trian.lr=1", KeyError, ["no key 'trian' at the top", "nearest: train"]),
        ("train.lr.x=1", KeyError, ["in 'train.lr' is a int"]),
        ("train.steps.2=1", KeyError, ["of 2, without '2'"]),
        ("train.lr", ValueError, ["KEY=VALUE"]),
        ("=1", ValueError, ["KEY=VALUE"]),
        ("train.steps=[1", ValueError, ["neither"]),
    ],
)
def test_bad_overrides_change_nothing(override, error, words):
    cfg = DictConfig({"train": example()["train"]})
    with pytest.raises(error) as caught:
        LazyConfig.apply_overrides(cfg, ["train.lr=7", override])
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert cfg.train.lr == 1e-4


@pytest.mark.parametrize(
    "call",
    [
        lambda tree: load(tree / "mark.py"),
        lambda _: instantiate({"_target_": "torch.nn.ReLU"}),
        lambda _: LazyCall(nn.ReLU)(),
    ],
)
def test_message_without_omegaconf(tree, monkeypatch, call):
    monkeypatch.setitem(sys.modules, "omegaconf", None)
    with pytest.raises(ImportError, match=r"pip install 'd2kit\[lazy\]'"):
        call(tree)


@pytest.mark.parametrize(
    "value", ["${oc.env:HOME}", "x/${oc.env:HOME}/y", "${a.${oc.env:X}}", "${oc.decode:${b}}"]
)
def test_resolvers_in_files_of_others_are_not_called(tmp_path, value):
    path = tmp_path / "a.yaml"
    path.write_text(f"a: 1\nb:\n  c: [1, '{value}']\n")
    with pytest.raises(ValueError, match=r"a.yaml:3: b.c: .* calls a resolver"):
        LazyConfig.load(str(path))


@pytest.mark.parametrize("value", ["${a}", "http://${a}:80/x", "a:b", "${b.d}/x"])
def test_references_and_plain_text_stay(tmp_path, value):
    path = tmp_path / "a.yaml"
    path.write_text(f"a: 1\nb:\n  c: '{value}'\n  d: 2\n")
    found = LazyConfig.load(str(path)).b.c
    assert str(found) == value.replace("${a}", "1").replace("${b.d}", "2")
