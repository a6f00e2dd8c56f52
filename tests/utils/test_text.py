"""The gate for text of others."""

import csv
import io
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2kit.utils.text import (
    csv_cell,
    drawn,
    file_name,
    from_csv_cell,
    from_one_line,
    html_text,
    one_line,
    xml_chars,
)

HOSTILE = [
    "line1\nline2",
    "\x1b[31mred\x1b]0;title\x07",
    "=cmd|' /C calc'!A0",
    "+1+1",
    "-2+3",
    "@SUM(A1)",
    "../../etc/passwd",
    "a\\nb",
    "C:\\new\\table",
    "'quoted",
    "half \ud800",
    "turned \u202egpj.exe",
    "",
    "   ",
    "con.txt",
    "<script>alert(1)</script>",
    "x" * 3000,
    "\0",
]
texts = st.one_of(st.sampled_from(HOSTILE), st.text(max_size=60))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("person", "person"),
        ("Füße 人 👩‍🚀", "Füße 人 👩‍🚀"),
        ("a\nb\tc", "a\\nb\\tc"),
        ("\x1b[31m", "\\x1b[31m"),
        ("C:\\data", "C:\\data"),
        ("C:\\new", "C:\\\\new"),
        ("\u202egpj", "\\u202egpj"),
        ("\ud800", "\\ud800"),
    ],
)
def test_one_line(text: str, expected: str) -> None:
    assert one_line(text) == expected


def test_long_text_is_cut_with_its_length() -> None:
    assert one_line("x" * 500, 10) == "x" * 10 + "... (490 more characters)"
    assert drawn("y" * 100, 10) == "y" * 9 + "…"


@given(texts)
def test_a_line_is_read_back_and_has_no_controls(text: str) -> None:
    line = one_line(text, None)
    assert from_one_line(line) == text
    assert len(line.splitlines()) <= 1
    assert not re.search("[\x00-\x1f\x7f-\x9f\ud800-\udfff]", line)


@pytest.mark.faults(37, fast=True)
@given(texts)
def test_a_csv_cell_is_no_formula_and_read_back(text: str) -> None:
    stream = io.StringIO()
    csv.writer(stream).writerow(["first", csv_cell(text)])
    (row,) = csv.reader(io.StringIO(stream.getvalue()))
    assert not row[1].startswith(("=", "+", "-", "@"))
    assert from_csv_cell(row[1]) == text


@given(texts)
def test_xml_is_read_back(text: str) -> None:
    node = ET.Element("label", name=xml_chars(text))
    node.text = xml_chars(text)
    read = ET.fromstring(ET.tostring(node, encoding="utf-8"))
    assert from_one_line(read.get("name", "")) == from_one_line(read.text or "") == text


@given(st.lists(texts, unique=True, max_size=8))
def test_file_names_are_single_sound_and_distinct(names: list[str]) -> None:
    made = [file_name(name, 40) for name in names]
    assert len(set(made)) == len(names)
    for name in made:
        assert name not in ("", ".", "..")
        assert not re.search('[/\\\\:*?"<>|\x00-\x1f]', name)
        assert len(name.encode()) <= 40


@pytest.mark.parametrize("name", ["person", "Füße", "two words", "x.y"])
def test_sound_names_stay(name: str) -> None:
    assert file_name(name) == name


def test_a_limit_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 24"):
        file_name("a", 10)


def test_html() -> None:
    assert html_text('<b onload="x">\x1b\n') == "&lt;b onload=&quot;x&quot;&gt;\\x1b\\n"
