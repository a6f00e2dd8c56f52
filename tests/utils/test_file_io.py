import errno
import os
import stat
import threading

import pytest

from d2kit.utils import file_io
from d2kit.utils.file_io import PathHandler, PathManager, atomic_write


@pytest.mark.parametrize(
    ("mode", "content"), [("wb", b"\x00\r\n\xff"), ("w", "käse\r\n"), ("wb", b""), ("w", "")]
)
def test_atomic_write(tmp_path, mode, content):
    target = tmp_path / "model.pth"
    target.write_bytes(b"old")
    with atomic_write(target, mode) as file:
        file.write(content)
        assert target.read_bytes() == b"old"
    expected = content.encode() if mode == "w" else content
    assert target.read_bytes() == expected
    assert os.listdir(tmp_path) == ["model.pth"]


def test_atomic_write_gives_the_usual_permissions(tmp_path):
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    with atomic_write(str(tmp_path / "atomic")):
        pass
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "atomic")]
    assert modes[0] == modes[1]


def write_and_raise(target, error):
    with atomic_write(target) as file:
        file.write(b"half")
        file.flush()
        raise error


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_failed_write_leaves_the_old_file(tmp_path, error):
    target = tmp_path / "model.pth"
    target.write_bytes(b"old")
    with pytest.raises(error):
        write_and_raise(target, error())
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["model.pth"]


def test_the_disk_begins_while_the_block_writes(tmp_path, monkeypatch):
    began = threading.Event()
    real = os.fsync

    def fsync(handle):
        real(handle)
        began.set()

    monkeypatch.setattr(file_io.os, "fsync", fsync)
    with atomic_write(tmp_path / "model.pth") as file:
        file.write(b"half")
        assert began.wait(10)
        file.write(b"whole")
    assert (tmp_path / "model.pth").read_bytes() == b"halfwhole"


def test_a_refusal_that_the_kernel_tells_only_once(tmp_path, monkeypatch):
    target = tmp_path / "model.pth"
    target.write_bytes(b"old")
    told = threading.Event()

    def fsync(handle):
        if not told.is_set():
            told.set()
            raise OSError(errno.EIO, "Input/output error")

    def write():
        with atomic_write(target) as file:
            file.write(b"new")
            assert told.wait(10)

    monkeypatch.setattr(file_io.os, "fsync", fsync)
    with pytest.raises(OSError, match=r"Input/output error.*model\.pth"):
        write()
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["model.pth"]


@pytest.mark.faults(14, fast=True)
def test_full_disk_is_reported_with_path_and_sizes(tmp_path):
    target = tmp_path / "model.pth"
    with pytest.raises(OSError, match="disk full: wrote 4 bytes") as caught:
        write_and_raise(target, OSError(errno.ENOSPC, "No space left on device"))
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(target)
    assert "OUTPUT_DIR" in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_atomic_write_mistakes(tmp_path):
    with pytest.raises(ValueError, match="mode"), atomic_write(tmp_path / "x", "a"):
        pass
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "missing/x"):
        pass
    assert os.listdir(tmp_path) == []


def test_path_manager(tmp_path):
    file = tmp_path / "a.txt"
    with PathManager.open(str(file), "w") as f:
        f.write("text")
    assert PathManager.exists(str(file))
    assert PathManager.get_local_path(str(file)) == str(file)


def test_users_can_register_handlers(tmp_path):
    class Mine(PathHandler):
        def _get_supported_prefixes(self):
            return ["mine-of-test://"]

        def _get_local_path(self, path, force=False, **kwargs):
            return str(tmp_path / path.removeprefix("mine-of-test://"))

    PathManager.register_handler(Mine())
    assert PathManager.get_local_path("mine-of-test://x") == str(tmp_path / "x")


def test_model_zoo_names_become_urls(monkeypatch):
    asked = []

    class Recorder:
        def get_local_path(self, url, force=False, **kwargs):
            asked.append(url)
            return "/local"

    manager = PathManager
    monkeypatch.setattr(file_io, "PathManager", Recorder())
    assert manager.get_local_path("detectron2://ImageNetPretrained/MSRA/R-50.pkl") == "/local"
    assert asked == ["https://dl.fbaipublicfiles.com/detectron2/ImageNetPretrained/MSRA/R-50.pkl"]
