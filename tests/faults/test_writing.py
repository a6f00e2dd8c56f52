"""FAULTS 11 to 15: a checkpoint is there as a whole or not at all.

Fails without: `atomic_write` in `DetectionCheckpointer.save` (write to the name itself: half a
file after a kill), its `except` (the temporary file of a full disk stays), `damage` in
`newest_checkpoint` (the truncated file is chosen), `check_output_dir` (the dataset is read first).
"""

import errno
import logging
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
from torch import nn

from d2kit.checkpoint import DetectionCheckpointer
from d2kit.data import DatasetCatalog
from d2kit.engine.hooks import PeriodicWriter
from d2kit.utils import events as event_storage
from d2kit.utils.file_io import remove_leftovers
from tests.support import fault_runs as runs
from tests.support import tiny_run as tiny


def model(iteration):
    net = nn.Linear(300, 300)
    nn.init.constant_(net.weight, iteration)
    return net


def save_and_die(folder, point):
    """Save iterations 0, 1; at call number `point` of the second save into the system, die."""
    DetectionCheckpointer(model(0), folder).save("model_0000000", iteration=0)
    calls = 0

    def count(event, args):
        nonlocal calls
        if event in ("open", "os.rename", "os.remove", "os.mkdir"):
            step()

    def step():
        nonlocal calls
        calls += 1
        if calls == point:
            os.kill(os.getpid(), signal.SIGKILL)

    def trace(frame, event, arg):
        if event == "c_call" and getattr(arg, "__name__", "") in (
            *("write", "write_record", "fsync", "replace", "flush", "close", "open"),
            *("state_dict", "write_end_of_file", "tag_last_checkpoint"),
        ):
            step()

    sys.addaudithook(count)
    sys.setprofile(trace)
    DetectionCheckpointer(model(1), folder).save("model_0000001", iteration=1)
    sys.setprofile(None)
    (folder / "calls").write_text(str(calls))


@pytest.mark.faults(11)
def test_fifty_kills_inside_a_save(tmp_path, caplog):
    whole = tmp_path / "whole"
    whole.mkdir()
    assert runs.finish(runs.start(save_and_die, whole, 0)) == 0
    points = int((whole / "calls").read_text())
    assert points >= 15
    found, killed = [], 0
    for k in range(50):
        folder = tmp_path / str(k)
        folder.mkdir()
        if k < points:
            process = runs.start(save_and_die, folder, k + 1)
        else:  # at any moment between the calls
            process = runs.start(save_and_die, folder, 0)
            runs.wait_for(lambda at=folder: any(at.iterdir()))
            time.sleep(0.0005 * (k - points))
            process.kill()
        killed += runs.finish(process) == -signal.SIGKILL
        remove_leftovers(folder)
        names = sorted(p.name for p in folder.iterdir())
        assert set(names) <= {"model_0000000.pth", "model_0000001.pth", "last_checkpoint", "calls"}
        if k >= points and "model_0000000.pth" not in names:
            continue  # killed inside the very first save
        checkpointer = DetectionCheckpointer(nn.Linear(300, 300), folder)
        extra = checkpointer.resume_or_load("", resume=True)
        assert checkpointer.resumed_from
        assert (checkpointer.model.weight == extra["iteration"]).all()
        found.append(extra["iteration"])
    assert killed >= points
    assert {0, 1} <= set(found)
    assert "cannot be used" not in caplog.text


@pytest.mark.faults(12, 13)
@pytest.mark.parametrize("length", [0, 1, 21, 1000, -1000, -22, -1])
def test_the_newest_checkpoint_is_cut(folder, length, caplog):
    if not (folder / "run").exists():
        runs.train(folder, "run", ("SOLVER.CHECKPOINT_PERIOD", 4, "SOLVER.MAX_ITER", 8))
    (folder / "run" / "model_final.pth").unlink()
    path = folder / "run" / "model_0000007.pth"
    os.truncate(path, length % path.stat().st_size if length else 0)
    (folder / "run" / "last_checkpoint").write_text("../../evil.pth")
    trainer = tiny.TinyTrainer(tiny.tiny_cfg(folder / "run"))
    logging.getLogger("d2kit").addHandler(caplog.handler)
    try:
        trainer.resume_or_load()
    finally:
        logging.getLogger("d2kit").removeHandler(caplog.handler)
    assert trainer.start_iter == 4
    assert "model_0000007.pth" in caplog.text


@pytest.mark.faults(12)
def test_a_checkpoint_cut_at_any_length(tmp_path):
    """Each length of a small one: 0, 1, 2, ..."""
    for iteration in (0, 1):
        small = DetectionCheckpointer(nn.Linear(1, 1), tmp_path)
        small.save(f"model_{iteration:07d}", iteration=iteration)
    newest = tmp_path / "model_0000001.pth"
    content = newest.read_bytes()
    logging.getLogger("d2kit.checkpoint.files").setLevel(logging.ERROR)
    try:
        for length in range(len(content)):
            newest.write_bytes(content[:length])
            assert small.get_checkpoint_file().endswith("model_0000000.pth"), length
    finally:
        logging.getLogger("d2kit.checkpoint.files").setLevel(logging.NOTSET)
    newest.write_bytes(content)
    assert small.get_checkpoint_file() == str(newest)


def fill_the_disk(folder):
    """A limit on the size of files: the system refuses in the middle of the write."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        DetectionCheckpointer(model(1), folder).save("model_0000001", iteration=1)
    except Exception as error:
        (folder / "error").write_text(f"{type(error).__name__}: {error}")


@pytest.mark.faults(14)
def test_a_write_that_the_system_refuses(tmp_path):
    DetectionCheckpointer(model(0), tmp_path).save("model_0000000", iteration=0)
    before = (tmp_path / "model_0000000.pth").read_bytes()
    assert runs.finish(runs.start(fill_the_disk, tmp_path)) == 0
    assert (tmp_path / "model_0000000.pth").read_bytes() == before
    names = {"model_0000000.pth", "last_checkpoint", "error"}
    assert {p.name for p in tmp_path.iterdir()} == names
    assert "model_0000001.pth" in (tmp_path / "error").read_text()


@pytest.mark.faults(14)
def test_a_full_disk(tmp_path):
    """On a real file system of 1 MB, where this process may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a file system")
    try:
        DetectionCheckpointer(model(0), disk).save("model_0000000", iteration=0)
        before = (disk / "model_0000000.pth").read_bytes()
        DetectionCheckpointer(model(1), disk).save("model_0000001", iteration=1)
        with pytest.raises(OSError, match=r"disk full: wrote [\d,]+ bytes") as error:
            DetectionCheckpointer(model(2), disk).save("model_0000002", iteration=2)
        assert error.value.errno == errno.ENOSPC
        assert str(disk) in str(error.value)
        assert (disk / "model_0000000.pth").read_bytes() == before
        assert not list(disk.glob(".*.tmp"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.faults(15, fast=True)
def test_a_folder_that_cannot_be_written(folder):
    (folder / "file").write_text("in the way")
    tiny.MetadataCatalog.remove(tiny.NAME)
    DatasetCatalog.remove(tiny.NAME)
    DatasetCatalog.register(tiny.NAME, lambda: pytest.fail("the dataset was read"))
    begin = time.monotonic()
    for path in (folder / "file" / "run", "/proc/run"):
        with pytest.raises(OSError, match=r"OUTPUT_DIR '.*' cannot be written to"):
            tiny.TinyTrainer(tiny.tiny_cfg(path))
    assert time.monotonic() - begin < runs.patience(2)


@pytest.mark.faults(34, fast=True)
def test_metrics_on_a_full_disk_come_later(folder, monkeypatch):
    """``metrics.json`` misses nothing once the disk has room; the training does not notice."""
    options = ("SOLVER.MAX_ITER", 12)

    class Writing(tiny.TinyTrainer):
        def build_hooks(self):
            return [*super().build_hooks()[:-1], PeriodicWriter(self.build_writers(), 2)]

    def train(output):
        trainer = Writing(tiny.tiny_cfg(folder / output, *options))
        trainer.resume_or_load()
        trainer.train()
        return runs.metrics(folder / output)

    wanted = train("straight")
    append, calls = event_storage._append, []

    def full(path, lines):
        calls.append(lines)
        if 2 <= len(calls) <= 4:
            raise OSError(errno.ENOSPC, "No space left on device", path)
        append(path, lines)

    monkeypatch.setattr(event_storage, "_append", full)
    assert train("run") == wanted
    assert len(wanted) == 6
    assert len(calls) >= 6
    assert (folder / "run" / "model_final.pth").exists()
