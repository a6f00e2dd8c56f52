from pathlib import Path

from d2kit.config.command import main
from d2kit.config.keys import markdown

DOCS = Path(__file__).parent.parent.parent / "docs/config.md"


def test_docs_are_current():
    current = DOCS.read_text(encoding="utf-8")
    assert current == markdown(), "run: python -m d2kit.config > docs/config.md"


def test_no_arguments_print_them(capsys):
    assert main([]) == 0
    assert capsys.readouterr().out == markdown()
