"""`tools/analyze_model.py` prints each of its tables, and names what is wrong in one line."""

import importlib.util
import sys

import pytest

from tests.support.code import ROOT


@pytest.fixture
def analyze(monkeypatch):
    """The script's main function, with the given arguments."""
    spec = importlib.util.spec_from_file_location("analyze", ROOT / "tools/analyze_model.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["analyze_model.py", *arguments])
        script.main()

    return run


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_tables(analyze, capsys):
    analyze(
        "--config-file", "Misc/semantic_R_50_FPN_1x.yaml",
        "--tasks", "flop", "activation", "parameter", "structure",
        "-n", "2", "--size", "64", "96",
        "MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64",
    )  # fmt: skip
    parts = [part.split("\n") for part in capsys.readouterr().out.split("== ")[1:]]
    assert [lines[0] for lines in parts] == ["flop", "activation", "parameter", "structure"]
    assert parts[0][1] == "mean over 2 inputs, deviation of the total 0"
    assert "10^9 multiply-adds" in parts[0][2]
    assert any("sem_seg_head.p5" in line for line in parts[0])
    assert "10^6 elements" in parts[1][2]
    assert any("backbone.fpn_lateral2" in line for line in parts[2])
    assert parts[3][1] == "SemanticSegmentor("


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config-file", "Misc/semantic_R_50_FPN.yaml"], "Misc/semantic_R_50_FPN_1x.yaml"),
        (["--config-file", "Misc/semantic_R_50_FPN_1x.yaml", "MODEL.MASK", "1"], "MODEL.MASK_ON"),
    ],
)
def test_wrong_arguments(analyze, capsys, arguments, words):
    with pytest.raises(SystemExit, match="1"):
        analyze(*arguments)
    assert words in capsys.readouterr().err
