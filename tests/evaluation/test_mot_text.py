"""MOT text of others: every form is read, every bad line is one message."""

from pathlib import Path

import pytest

from d2kit.evaluation.track_evaluation import evaluate_tracks, read_mot_text

FORMS = {
    "six columns": "{f},{i},{x},20,20,24\n",
    "seven": "{f},{i},{x},20,20,24,1\n",
    "class -1": "{f},{i},{x},20,20,24,1,-1\n",
    "MOT15 ground truth": "{f},{i},{x},20,20,24,1,4.2,-7.5,0\n",
    "MOT15 results": "{f},{i},{x},20,20,24,-1,-1,-1,-1\n",
    "MOT16": "{f},{i},{x},20,20,24,1,1,0.8\n",
    "blanks": "{f} {i} {x} 20 20 24 1\n",
    "semicolons": "{f};{i};{x};20;20;24;1\n",
}


@pytest.mark.parametrize("form", FORMS)
def test_identical_files_give_100(tmp_path: Path, form: str) -> None:
    text = "".join(FORMS[form].format(f=f, i=i, x=f + 90 * i) for f in range(1, 6) for i in (1, 2))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text(text)
    found = evaluate_tracks(tmp_path / "a.txt", tmp_path / "b.txt")["overall"]
    assert (found["MOTA"], found["IDF1"], found["HOTA"]) == (100, 100, 100)


def test_other_classes_are_left_out_on_both_sides(tmp_path: Path) -> None:
    lines = [f"{f},1,10,20,20,24,1,1,1\n{f},2,200,20,20,24,1,3,1\n" for f in range(1, 6)]
    (tmp_path / "a.txt").write_text("".join(lines))
    (tmp_path / "b.txt").write_text("".join(lines))
    assert evaluate_tracks(tmp_path / "a.txt", tmp_path / "b.txt")["overall"]["MOTA"] == 100


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("6,1,a,b,c,d,1,1,1", "line 2: left must be a number, got 'a'"),
        ("6,1,10", "line 2: expected at least 6 columns"),
        ("6,1,nan,20,20,24,1,1,1", "line 2: left must be finite"),
        ("6,1,10,20,inf,24,1,1,1", "line 2: width must be finite"),
        ("6.5,1,10,20,20,24,1,1,1", "line 2: frame must be a whole number"),
        ("0,1,10,20,20,24,1,1,1", "line 2: frame must be in"),
        ("999999999999,1,10,20,20,24", "line 2: frame must be in"),
        ("6,1,10,20,-20,24,1,1,1", "line 2: width and height must be positive"),
        ("6,1,1e9,20,20,24,1,1,1", "line 2: width and height"),
        ("6;1;10;20;20;24;1;1;1", "line 2: expected at least 6 columns"),
        ("1,1,10,20,20,24", "line 2: id 1 is twice in frame 1, also in line 1"),
        ("6," + "9" * 5000 + ",10,20,20,24", "line 2: id must be a number"),
        ("6,1_0,10,20,20,24", "line 2: id must be a number"),
        ("<html>\x1b[31m</html>", r"line 2: expected at least 6 columns.*\\x1b"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "ward.txt"
    path.write_text("1,1,10,20,20,24,1,1,1\n" + line + "\n")
    with pytest.raises(ValueError, match=message) as found:
        read_mot_text(path)
    assert "ward.txt" in str(found.value)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"1,1,10,20,20,24\n\xff\xfe\x00")
    with pytest.raises(ValueError, match="x.txt, behind line .*not UTF-8"):
        read_mot_text(tmp_path / "x.txt")
