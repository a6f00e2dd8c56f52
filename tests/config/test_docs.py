from pathlib import Path

import pytest

from d2kit.config.__main__ import main
from d2kit.config._docs import explain, markdown

DOCS = Path(__file__).parent.parent.parent / "docs/config.md"


def test_docs_are_current():
    current = DOCS.read_text(encoding="utf-8")
    assert current == markdown(), "run: python -m d2kit.config > docs/config.md"


def test_explain(capsys):
    assert explain("SOLVER.MAX_ITER") == "SOLVER.MAX_ITER (default 40000): Training iterations."
    with pytest.raises(KeyError, match=r"SOLVER\.MAX_ITER"):
        explain("SOLVER.MAX_ITERS")
    assert main(["SEED"]) == 0
    assert "SEED (default -1)" in capsys.readouterr().out
    assert main(["SEDE"]) == 2
    assert "SEED" in capsys.readouterr().err
    assert main([]) == 0
    assert capsys.readouterr().out == markdown()
