"""The command line `d2kit`: its table, its messages, exit codes, and the scripts over it."""

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import d2kit
from d2kit.cli import GROUPS, VERBS, help_text, main
from tests.support.code import ROOT

WITHOUT_PATH = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}


def test_help_lists_every_verb_and_imports_nothing():
    code = "import sys; from d2kit.cli import main; main(['--help']); print(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    *table, loaded = done.stdout.splitlines()
    assert "\n".join(table) == help_text()
    for verb in VERBS:
        assert sum(line.startswith(f"  {verb} ") for line in table) == 1
    assert max(map(len, table)) <= 88
    ours = {name for name in loaded.split() if name.split(".")[0] == "d2kit"}
    assert ours == {"d2kit", "d2kit.cli"}
    assert not {"torch", "numpy", "cv2", "yaml", "argparse"} & set(loaded.split())


def test_every_verb_is_a_function_and_every_module_has_verbs():
    files = {path.stem for path in (ROOT / "d2kit/cli").glob("*.py")} - {"__init__"}
    assert files == {module for module, _ in VERBS.values()}
    assert len(set(VERBS.values())) == len(VERBS)
    for module, function in VERBS.values():
        assert callable(getattr(importlib.import_module(f"d2kit.cli.{module}"), function))
    assert len(VERBS) == sum(map(len, GROUPS.values()))


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_helps_under_its_name(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: d2kit {verb} ")
    assert ".py " not in text.split("\n\n")[0]


def test_training_from_a_config_has_the_options_of_it(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--config-file", "x.yaml", "--help"])
    text = capsys.readouterr().out
    assert text.startswith("usage: d2kit train ")
    assert all(option in text for option in ("--resume", "--eval-only", "--num-gpus", "--dry-run"))


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["trian"], 2, "no verb 'trian' (nearest: train"),
        (["evaluate_tracks"], 2, "nearest: evaluate-tracks"),
        (["xyzzy"], 2, "`d2kit --help` lists them"),
    ],
)
def test_unknown_verbs(words, code, message, capsys):
    assert main(words) == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"], ["help"]])
def test_help(words, capsys):
    assert main(words) == 0
    assert capsys.readouterr().out == help_text() + "\n"


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"d2kit {d2kit.__version__}\n"
    assert f"version: {d2kit.__version__}\n" in (ROOT / "CITATION.cff").read_text() + "\n"
    assert f"## [{d2kit.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_training_on_nothing_names_both_ways(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train"])
    assert stop.value.code == 2
    assert "give --data FOLDER" in capsys.readouterr().err


def test_exit_codes_are_those_of_the_verb(tmp_path, capsys):
    (tmp_path / "a.json").write_text(json.dumps({"images": [{"id": 1}]}))
    assert main(["check", str(tmp_path / "a.json")]) == 1
    assert main(["config", "explain", "SOLVER.BASE_LR"]) == 0
    assert main(["config", "explain", "SOLVER.BASELR"]) == 2
    with pytest.raises(SystemExit) as stop:
        main(["predict", "--config-file", "no/such.yaml", "--input", str(tmp_path)])
    assert stop.value.code == 1
    assert "no/such.yaml" in capsys.readouterr().err


def test_the_package_is_d2kit_alone(monkeypatch):
    """What `pip install` puts into site-packages, as setup.py tells it."""
    monkeypatch.chdir(ROOT)
    import setuptools  # noqa: F401 - provides distutils where Python has none

    run_setup = importlib.import_module("distutils.core").run_setup
    found = run_setup("setup.py", stop_after="init")
    assert {name.split(".")[0] for name in found.packages} == {"d2kit"}
    assert "d2kit.cli" in found.packages
    assert found.entry_points == {"console_scripts": ["d2kit = d2kit.cli:main"]}


SCRIPTS = sorted(path.name for path in (ROOT / "tools").glob("*.py"))
WHOLE = {  # one page to read and change; measurements on the experiments of the checkout
    *("plain_train_net.py", "benchmark_protection.py", "benchmark_video.py"),
    "compatibility.py",
}


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name not in WHOLE])
def test_scripts_are_thin(name):
    tree = ast.parse((ROOT / "tools" / name).read_text())
    assert sum(isinstance(node, ast.stmt) for node in ast.walk(tree)) <= 16
    modules = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert any(str(module).startswith("d2kit.cli") for module in modules)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) for n in SCRIPTS])
def test_scripts_run_from_anywhere(name, tmp_path):
    """From another folder, with nothing on the path: d2kit and project are found."""
    if name.startswith("benchmark") and not Path("/proc").is_dir():
        pytest.skip("Linux only")
    command = [sys.executable, str(ROOT / "tools" / name), "--help"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, env=WITHOUT_PATH
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
