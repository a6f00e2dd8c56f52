"""FAULTS 11 (leftovers), 16: one run at a time in a folder.

Fails without: `hold_output_dir` in `DefaultTrainer.__init__` (the second run starts), `_lives` (a
dead process holds the folder for ever), `remove_leftovers` (temporary files of kills pile up).
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from d2kit.engine.safety import run_lock as _run_lock
from d2kit.engine.safety.run_lock import NAME, RunLock, hold_output_dir, release_output_dir
from tests.support import fault_runs as runs
from tests.support import tiny_run as tiny


def contents(folder):
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir() if p.is_file()}


def hang(trainer):
    if trainer.iter == 7:
        time.sleep(60)


@pytest.mark.faults(16)
def test_the_second_process_names_the_first_and_changes_nothing(folder):
    progress = runs.CONTEXT.Value("q", -1)
    first = runs.start(runs.train, folder, "run", (), progress, hang)
    try:
        runs.wait_for(lambda: progress.value == 7)
        before = contents(folder / "run")
        begin = time.monotonic()
        with pytest.raises(BlockingIOError) as error:
            tiny.TinyTrainer(tiny.tiny_cfg(folder / "run"))
        assert time.monotonic() - begin < runs.patience(2)
        assert f"process {first.pid} on {socket.gethostname()}" in str(error.value)
        assert contents(folder / "run") == before
    finally:
        first.kill()
        runs.finish(first)
    left = folder / "run" / ".model_0000005.pth.99999999-0011aabb.tmp"
    left.write_bytes(b"half")
    mine = folder / "run" / ".notes.tmp"
    mine.write_bytes(b"not ours")
    trainer = tiny.TinyTrainer(tiny.tiny_cfg(folder / "run"))  # takes over from the dead one
    trainer.resume_or_load()
    assert trainer.start_iter == 6
    assert not left.exists()
    assert mine.exists()
    release_output_dir(folder / "run")
    assert not (folder / "run" / NAME).exists()


def other(path, **changes):
    owner = {"pid": os.getpid(), "host": "elsewhere", "start": "1", **changes}
    path.write_text(json.dumps(owner))


@pytest.mark.faults(16, fast=True)
def test_a_process_on_another_machine_lives_by_its_signs_of_life(tmp_path):
    path = tmp_path / NAME
    other(path)
    with pytest.raises(BlockingIOError, match=rf"process {os.getpid()} on elsewhere"):
        RunLock(tmp_path)
    assert json.loads(path.read_text())["host"] == "elsewhere"
    old = time.time() - _run_lock.STALE - 1
    os.utime(path, (old, old))
    lock = RunLock(tmp_path)
    assert json.loads(path.read_text())["host"] == socket.gethostname()
    lock.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.faults(16, fast=True)
def test_a_number_used_again_is_another_process(tmp_path):
    other(tmp_path / NAME, host=socket.gethostname())  # our number, started at another time
    RunLock(tmp_path).release()


@pytest.mark.faults(16, fast=True)
@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"[]", b'{"pid": "x"}'])
def test_an_unreadable_lock_is_taken_over(tmp_path, content):
    """Complete files only take the name of the lock: what names no process is none of ours."""
    (tmp_path / NAME).write_bytes(content)
    RunLock(tmp_path).release()
    assert not (tmp_path / NAME).exists()


@pytest.mark.faults(16, fast=True)
def test_signs_of_life_are_given(tmp_path, monkeypatch):
    monkeypatch.setattr(_run_lock, "HEARTBEAT", 0.01)
    lock = RunLock(tmp_path)
    os.utime(lock.path, (1, 1))
    runs.wait_for(lambda: lock.path.stat().st_mtime > 2)
    lock.release()


@pytest.mark.faults(16, fast=True)
def test_holding_twice_is_holding_once(tmp_path):
    hold_output_dir(tmp_path)
    before = (tmp_path / NAME).stat().st_mtime_ns
    hold_output_dir(tmp_path)
    assert (tmp_path / NAME).stat().st_mtime_ns == before
    release_output_dir(tmp_path)
    release_output_dir(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.faults(16)
def test_of_many_processes_one_gets_the_folder(tmp_path):
    code = (
        "import sys; from pathlib import Path; from d2kit.engine.safety.run_lock import RunLock\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "try: lock = RunLock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.readline()\n"
        "except BlockingIOError: print('refused', flush=True)\n"
    )
    other(tmp_path / NAME, host=socket.gethostname(), pid=2**22)  # all find the lock of a dead one
    crowd = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    assert [process.stdout.readline() for process in crowd] == ["ready\n"] * 4
    for process in crowd:
        process.stdin.write("go\n")
        process.stdin.flush()
    said = sorted(process.stdout.readline().strip() for process in crowd)
    for process in crowd:
        process.communicate(timeout=600)
    assert said == ["held", "refused", "refused", "refused"]


@pytest.mark.faults(16, fast=True)
def test_killed_is_dead(tmp_path):
    process = subprocess.Popen(["sleep", "60"])
    owner = {"pid": process.pid, "host": socket.gethostname()}
    owner["start"] = _run_lock._start(process.pid)
    (tmp_path / NAME).write_text(json.dumps(owner))
    with pytest.raises(BlockingIOError, match=f"process {process.pid} on"):
        RunLock(tmp_path)
    process.send_signal(signal.SIGKILL)
    runs.wait_for(lambda: _run_lock._start(process.pid) == "")  # a zombie is dead too
    RunLock(tmp_path).release()
    process.wait()
