"""Tools replace what they wrote themselves, all of it or nothing, and no file of others."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from d2kit.cli.data import check_main, convert_main, split_main
from d2kit.cli.visualize import write_pictures
from d2kit.utils.file_io import OWN, OwnFiles, atomic_write

ESCAPE = "a\x1b[2J\x07\nb"


def write_coco(path: Path, count: int = 4, name: str = "a") -> Path:
    """Write a COCO file of `count` images with a square each."""
    images = [
        {"id": i, "file_name": f"{i}.png", "width": 20, "height": 20} for i in range(1, count + 1)
    ]
    square = {"bbox": [2, 2, 8, 8], "area": 64, "iscrowd": 0, "category_id": 1}
    square["segmentation"] = [[2, 2, 10, 2, 10, 10, 2, 10]]
    truth = {
        "images": images,
        "annotations": [{**square, "id": i["id"], "image_id": i["id"]} for i in images],
        "categories": [{"id": 1, "name": name}, {"id": 2, "name": "b"}],
    }
    path.write_text(json.dumps(truth))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def refusing(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let every write under a name fail as on a full disk."""
    real = os.fsync

    def fsync(handle: int) -> None:
        if name in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)


FOLDERS = ("yolo", "voc", "labelme", "masks")


def convert(source: Path, kind: str, target: Path, *options: str) -> None:
    convert_main(["--from", "coco", "--to", kind, str(source), str(target), *options])


@pytest.mark.parametrize("kind", FOLDERS)
def test_nothing_of_an_earlier_conversion_stays(tmp_path: Path, kind: str) -> None:
    convert(write_coco(tmp_path / "4.json"), kind, tmp_path / "o")
    convert(write_coco(tmp_path / "2.json", 2), kind, tmp_path / "o")
    convert(tmp_path / "2.json", kind, tmp_path / "fresh")
    assert contents(tmp_path / "o") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_label_of_others_is_not_replaced(tmp_path: Path, kind: str) -> None:
    source = write_coco(tmp_path / "a.json")
    convert(source, kind, tmp_path / "o")
    (tmp_path / "o" / OWN).unlink()  # from here on they are somebody's
    before = contents(tmp_path / "o")
    with pytest.raises(SystemExit):
        convert(source, kind, tmp_path / "o")
    assert contents(tmp_path / "o") == before
    convert(source, kind, tmp_path / "o", "--overwrite")


@pytest.mark.parametrize(("kind", "name"), [("coco", "o.json"), ("cvat", "o.xml")])
def test_a_single_file_of_others_is_not_replaced(tmp_path: Path, kind: str, name: str) -> None:
    source, target = write_coco(tmp_path / "a.json"), tmp_path / name
    target.write_text('{"mine": 1}')
    with pytest.raises(SystemExit):
        convert(source, kind, target)
    assert target.read_text() == '{"mine": 1}'
    convert(source, kind, target, "--overwrite")
    convert(source, kind, target)  # now it is ours


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="asks Linux for names")
@pytest.mark.parametrize("kind", FOLDERS)
def test_a_conversion_on_a_full_disk_leaves_the_old_files(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_coco(tmp_path / "a.json")
    convert(source, kind, tmp_path / "o")
    before = contents(tmp_path / "o")
    refusing(monkeypatch, "3.")
    with pytest.raises(SystemExit):
        convert(source, kind, tmp_path / "o")
    assert contents(tmp_path / "o") == before
    error = capsys.readouterr().err
    assert "disk full" in error
    assert f"{tmp_path}/o/" in error
    assert ".convert-" not in error


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="asks Linux for names")
def test_a_split_on_a_full_disk_mixes_no_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [str(write_coco(tmp_path / "a.json", 8)), "--output", str(tmp_path / "o")]
    argv += ["--parts", "train=0.5", "test=0.5", "--seed"]
    assert split_main([*argv, "1"]) == 0
    before = contents(tmp_path / "o")
    refusing(monkeypatch, "test.json")
    with pytest.raises(SystemExit):
        split_main([*argv, "2"])
    assert contents(tmp_path / "o") == before
    assert "test.json" in capsys.readouterr().err


def test_a_repair_replaces_neither_its_input_nor_a_file_of_others(tmp_path: Path) -> None:
    source, other = write_coco(tmp_path / "a.json"), tmp_path / "mine.json"
    other.write_text('{"mine": 1}')
    before = source.read_bytes()
    for target in (source, other):
        with pytest.raises(SystemExit):
            check_main([str(source), "--fix", str(target)])
    assert source.read_bytes() == before
    assert other.read_text() == '{"mine": 1}'
    for _ in range(2):
        check_main([str(source), "--fix", str(tmp_path / "fixed.json")])


def test_names_reach_no_terminal_raw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_coco(tmp_path / "a.json", name=ESCAPE)
    data = json.loads(source.read_text())
    for image in data["images"]:
        image["video"] = ESCAPE
    data["images"].append({"id": 9, "file_name": f"{ESCAPE}.png", "width": 20, "height": 20})
    source.write_text(json.dumps(data))
    check_main([str(source)])
    split_main(
        [str(source), "--output", str(tmp_path / "o"), "--parts", f"{ESCAPE[:3]}=0.5", "c=0.5"]
    )
    split_main(["--check", str(source), str(source)])
    convert(source, "voc", tmp_path / "v")
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err
    assert "\x07" not in said.out + said.err


def test_pictures_of_an_earlier_run_are_removed_and_those_of_others_kept(tmp_path: Path) -> None:
    picture = np.zeros((4, 4, 3), np.uint8)
    write_pictures(tmp_path, [(f"{i}.png", picture) for i in range(4)])
    write_pictures(tmp_path, [("0.png", picture)])
    assert {p.name for p in tmp_path.glob("*.jpg")} == {"0.jpg"}
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"photo\.jpg exists and was not written by this tool"):
        write_pictures(tmp_path, [("photo.png", picture)])
    assert (tmp_path / "photo.jpg").read_bytes() == b"mine"


@pytest.mark.parametrize("line", ["../keep.txt", "/etc/hostname", "", "folder", "a/../../keep.txt"])
def test_a_list_of_others_deletes_nothing_outside(tmp_path: Path, line: str) -> None:
    folder = tmp_path / "o"
    (folder / "folder").mkdir(parents=True)
    (tmp_path / "keep.txt").write_text("mine")
    (folder / OWN).write_text(f"{line}\n")
    OwnFiles(folder, "").clear()
    assert (tmp_path / "keep.txt").read_text() == "mine"
    assert (folder / "folder").is_dir()


def test_an_error_of_another_file_keeps_its_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"), atomic_write(tmp_path / "a"):
        open(tmp_path / "nowhere.json").close()
    assert not list(tmp_path.iterdir())
