"""Every item of docs/faults.md has tests, and what is written about them is true."""

import ast
import re

import pytest

from tests.faults.take_out import PROTECTIONS, place
from tests.support.code import ROOT, sources

ITEMS = set(range(1, 41))
LINES = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8").splitlines()
TABLE = {int(m[1]): line for line in LINES if (m := re.match(r"\| (\d+) \|", line))}


def numbers_of(node):
    """Return the items of each ``pytest.mark.faults(...)`` in a piece of code."""
    calls = [n for n in ast.walk(node) if isinstance(n, ast.Call)]
    marks = [n for n in calls if ast.unparse(n.func) == "pytest.mark.faults"]
    return [argument.value for mark in marks for argument in mark.args]


def marked():
    """Return items by ``path::name of the test``."""
    found = {}
    for source in sources("tests"):
        whole = [
            n for node in source.tree.body if isinstance(node, ast.Assign) for n in numbers_of(node)
        ]
        for node in source.tree.body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                own = [n for decorator in node.decorator_list for n in numbers_of(decorator)]
                found[f"{source.path}::{node.name}"] = {*own, *whole}
    return found


MARKED = marked()


@pytest.mark.parametrize("item", sorted(ITEMS))
def test_item_has_a_test_and_a_row(item):
    assert any(item in items for items in MARKED.values())
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", TABLE[item])
    assert named
    for path, test in named:
        tests = [f"{path}::{test}"] if test else [name for name in MARKED if name.startswith(path)]
        assert any(item in MARKED[name] for name in tests), (path, test)


def test_the_table_has_no_other_rows():
    assert set(TABLE) == ITEMS


def test_a_mark_names_its_items():
    """A mark without numbers would be in the tier but in no row."""
    bare = [s.path for s in sources("tests") if re.search(r"mark\.faults\n", s.text)]
    assert not bare


@pytest.mark.parametrize("protection", PROTECTIONS, ids=lambda p: f"{p.item} {p.what}")
def test_protection_can_be_taken_out(protection):
    _, text, start, end = place(protection)
    ast.parse(text[:start] + protection.new + text[end:])
    path, _, name = protection.test.partition("::")
    tests = [protection.test] if name else [test for test in MARKED if test.startswith(path)]
    assert any(protection.item in MARKED[test] for test in tests)
