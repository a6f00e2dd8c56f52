"""Archives of others: bounds before a byte is written."""

import zipfile
from pathlib import Path

import pytest

from d2kit.utils.file_io import extract_zip


def test_many_small_bombs(tmp_path: Path) -> None:
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bundle:
        for i in range(30):
            bundle.writestr(str(i), bytes(1 << 20))
    with pytest.raises(ValueError, match="refused as a bomb"):
        extract_zip(path, tmp_path / "o")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("names", [("a", "A"), ("x/../../y",), ("a\x1b[31m",), ("/",)])
def test_names_that_are_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as bundle:
        for name in names:
            bundle.writestr(name, "text")
    if names == ("/",):
        assert extract_zip(path, tmp_path / "o") == []  # a folder
        return
    with pytest.raises(ValueError, match=r"x\.zip"):
        extract_zip(path, tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_nothing_is_left_of_a_damaged_one(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as bundle:
        bundle.writestr("a", "A" * 100)
        bundle.writestr("b", "B" * 100)
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"B" * 100, b"B" * 99 + b"C"))
    with pytest.raises(ValueError, match="not a readable zip"):
        extract_zip(path, tmp_path / "o")
    assert not list((tmp_path / "o").iterdir())
