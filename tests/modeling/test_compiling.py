"""MODEL.COMPILE: what a machine can do, and that nothing but the speed changes."""

import copy
import json
import logging
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._inductor.config
from torch import nn

from d2kit.checkpoint import DetectionCheckpointer
from d2kit.engine.resolve import build_run
from d2kit.modeling import build_model, optimize_for_inference
from d2kit.modeling.compiling import choose_compile_mode, compile_trunk
from d2kit.utils.events import EventStorage
from tests.support.tiny_dense import tiny_dense_config
from tests.support.tiny_model import tiny_config, tiny_input
from tests.support.train_in_processes import train

REPOSITORY = Path(__file__).parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or not Path(sysconfig.get_paths()["include"], "Python.h").is_file(),
    reason="torch.compile needs a C++ compiler and Python's headers: no g++ or no Python.h",
)


@pytest.fixture
def small_compiler(monkeypatch):
    """No pool of compiler processes and no compiled headers: they cost more than they save here."""
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    with torch._inductor.config.patch(compile_threads=1, cpp_cache_precompile_headers=False):
        yield


@pytest.mark.parametrize(
    ("name", "device", "options", "expected", "reason"),
    [
        ("none", CPU, {}, "none", ""),
        (None, CPU, {}, "none", ""),
        ("None", CUDA, {}, "none", ""),
        ("graph", CUDA, {}, "graph", ""),
        ("graph", CPU, {}, "none", "graphs are CUDA's, and the model is on cpu"),
        ("trunk", torch.device("mps"), {}, "none", "for cpu and cuda only"),
        ("trunk", CUDA, {"deterministic": True}, "none", "DETERMINISTIC takes no generated"),
        ("graph", CUDA, {"deterministic": True}, "graph", ""),
    ],
)
def test_what_a_machine_can_do(name, device, options, expected, reason, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    mode, why = choose_compile_mode(name, device, **options)
    assert mode == expected
    assert bool(why) is bool(reason)
    assert reason in why


@pytest.mark.parametrize(("device", "lacks"), [(CPU, "there is no no-such-g"), (CUDA, "triton")])
def test_a_machine_without_a_compiler_is_told_in_one_line(device, lacks, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-g++ -O2")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    mode, why = choose_compile_mode("trunk", device)
    assert mode == "none"
    assert lacks in why


@pytest.mark.parametrize("name", ["all", "", "graphs"])
def test_another_word_is_refused(name):
    with pytest.raises(ValueError, match="expected none, trunk or graph, got"):
        build_model(tiny_config("MODEL.COMPILE", name))


@pytest.mark.parametrize(("mode", "reason"), [("graph", "CUDA's"), ("trunk", "C\\+\\+ compiler")])
def test_without_the_means_the_model_is_that_of_none(mode, reason, caplog, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-g++")
    with caplog.at_level(logging.WARNING):
        model = build_model(tiny_config("MODEL.COMPILE", mode))
    (line,) = caplog.messages
    assert line.startswith(f"MODEL.COMPILE {mode}: ")
    assert reason.replace("\\", "") in line
    assert "forward" not in vars(model.backbone)


def test_the_config_of_a_run_has_what_the_machine_does():
    cfg = tiny_config("MODEL.COMPILE", "graph")

    class Loader:
        dataset = [{}]  # noqa: RUF012

    run = build_run(
        cfg,
        scale=lambda cfg, _: cfg,
        build_loader=lambda _: Loader(),
        check_datasets=lambda *_: {},
    )
    assert run.cfg.MODEL.COMPILE == "none"
    (change,) = [c for c in run.changes if c.key == "MODEL.COMPILE"]
    assert (change.given, change.used) == ("graph", "none")
    assert "CUDA's" in change.why


def losses_and_gradients(model, batch):
    torch.manual_seed(1)
    model.zero_grad()
    with EventStorage():
        losses = model(copy.deepcopy(batch))
        sum(losses.values()).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {key: value.detach() for key, value in losses.items()}, grads


def same(one, two):
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def programs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@needs_compiler
@pytest.mark.slow
@pytest.mark.usefixtures("small_compiler")
def test_a_compiled_trunk_learns_the_same(tmp_path):
    torch.manual_seed(0)
    plain = build_model(tiny_config())
    fast = build_model(tiny_config("MODEL.COMPILE", "trunk"))
    assert list(fast.state_dict()) == list(plain.state_dict())
    DetectionCheckpointer(plain, str(tmp_path)).save("weights")
    DetectionCheckpointer(fast).load(str(tmp_path / "weights.pth"))
    before = programs()
    for _ in range(2):
        batch = [tiny_input(1), tiny_input(2)]
        expected, found = losses_and_gradients(plain, batch), losses_and_gradients(fast, batch)
        assert found[0].keys() == expected[0].keys()
        assert found[1].keys() == expected[1].keys()
        same(found, expected)
    assert programs() - before == 2  # trunk and head


@needs_compiler
@pytest.mark.slow
@pytest.mark.usefixtures("small_compiler")
def test_a_compiled_trunk_finds_the_same_at_all_sizes():
    """Of a one-stage detector; the copy for inference compiles anew."""
    torch.manual_seed(0)
    plain = build_model(tiny_dense_config("RetinaNet")).eval()
    fast = build_model(tiny_dense_config("RetinaNet", "MODEL.COMPILE", "trunk")).eval()
    fast.load_state_dict(plain.state_dict())
    folded = optimize_for_inference(fast)
    assert folded.backbone.forward.module is folded.backbone
    before = programs()
    for size in ((64, 80), (96, 72), (48, 120)):
        with torch.inference_mode():
            found, expected = (
                model([tiny_input(3, size=size)])[0]["instances"] for model in (folded, plain)
            )
        same(found.scores, expected.scores)
        same(found.pred_boxes.tensor, expected.pred_boxes.tensor)
        assert torch.equal(found.pred_classes, expected.pred_classes)
    assert programs() - before == 2


class Branching(nn.Module):
    """What a backbone may be: two layers, one of them watched by a test."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x):
        return {"a": self.second(self.first(x).relu())}


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = Branching()


@needs_compiler
@pytest.mark.slow
@pytest.mark.usefixtures("small_compiler")
def test_hooks_see_what_they_saw():
    model = Whole().eval()
    assert compile_trunk(model, "trunk") == ["backbone"]
    x = torch.rand(2, 3, 16, 16)
    seen = []
    outer = model.backbone.register_forward_hook(lambda *_: seen.append("outer"))
    with torch.no_grad():
        first = model.backbone(x)["a"]
        assert seen == ["outer"]
        inner = model.backbone.first.register_forward_hook(lambda *_: seen.append("inner"))
        model.backbone(x)
        assert seen == ["outer", "inner", "outer"]
        inner.remove()
        outer.remove()
        model.backbone.second.weight.mul_(2)
        model.backbone.second.bias.mul_(2)
        same(model.backbone(x)["a"], 2 * first)
    assert len(seen) == 3


@needs_compiler
@pytest.mark.slow
@pytest.mark.usefixtures("small_compiler")
def test_a_compiler_that_fails_is_one_line_and_the_plain_model(caplog, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("this compiler is broken")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", fails)
    model = Whole().eval()
    compile_trunk(model, "trunk")
    x = torch.rand(1, 3, 9, 9)
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        found = [model.backbone(x)["a"] for _ in range(2)]
        same(found, [Branching.forward(model.backbone, x)["a"]] * 2)
    (line,) = [x for x in caplog.messages if "MODEL.COMPILE" in x]
    assert "cannot be compiled" in line
    assert "this compiler is broken" in line


@needs_compiler
@pytest.mark.slow
@pytest.mark.usefixtures("small_compiler")
def test_two_processes_with_a_compiled_trunk_learn_what_one_plain_one_learns(tmp_path):
    command = [sys.executable, "-m", "tests.support.train_in_processes"]
    processes = [
        subprocess.Popen([*command, str(rank), "2", "3", str(tmp_path), "compiled"], cwd=REPOSITORY)
        for rank in range(2)
    ]
    alone = train("GeneralizedRCNN", 0, 1, 3)
    assert [p.wait(timeout=120) for p in processes] == [0, 0]
    two = [json.loads((tmp_path / f"{r}.json").read_text())["compiled"] for r in range(2)]
    for key, expected in alone.items():
        mean = (np.array(two[0][key]) + np.array(two[1][key])) / 2
        np.testing.assert_allclose(mean, expected, rtol=1e-4, atol=1e-5, err_msg=key)
