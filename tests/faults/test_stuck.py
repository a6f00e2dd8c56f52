"""FAULTS 20: a process that hangs, raises, or whose parent is killed.

Fails without: `watchdog` in `launch` (the run hangs), `GRACE` in `_spawn` (30 s until the others
are killed), `prctl` in torch's spawn and torch's watch over the parent in loader workers (orphans).
"""

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from d2kit.data import DatasetMapper, build_detection_train_loader
from d2kit.engine import launch
from d2kit.engine.evaluate import validation_losses
from d2kit.evaluation import DatasetEvaluators, inference_on_dataset
from d2kit.utils import comm
from tests.support import fault_runs as runs
from tests.support import tiny_run as tiny

ROOT = Path(__file__).parents[2]


def two(folder, kind, workers=0):
    """Train in two processes, where rank 1 does something bad in iteration 5."""
    folder = Path(folder)
    (folder / f"pid{comm.get_rank()}").write_text(str(os.getpid()))

    def act(trainer):
        if trainer.iter != 5:
            return
        if comm.get_rank() == 0:
            # at work on something of its own, not in a collective that breaks with the other
            time.sleep(50 if kind == "raise" else 0)
            return
        (folder / "begin").write_text(str(time.time()))
        if kind == "raise":
            raise RuntimeError("bad on purpose")
        if kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)

    options = ("SOLVER.MAX_ITER", 100_000, "SOLVER.CHECKPOINT_PERIOD", 1000)
    options += ("DATALOADER.NUM_WORKERS", workers)
    runs.train(folder, "run", options, act=act, noise=False)


def start(folder, kind, workers=0):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.faults.test_stuck", str(folder), kind, str(workers)]
    with (folder / "stderr").open("wb") as err, (folder / "stdout").open("wb") as out:
        return subprocess.Popen(command, env=env, cwd=ROOT, stderr=err, stdout=out)


def alive(pid):
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return text.rpartition(")")[2].split()[0] not in "ZX"


def children(pid):
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, path.read_text().split()):
            found += [child, *children(child)]
    return found


@pytest.mark.faults(20)
def test_a_stopped_process_is_named(folder):
    process = start(folder, "stop")
    assert process.wait(600) == 1
    took = time.time() - float((folder / "begin").read_text())
    text = (folder / "stderr").read_text()
    assert "rank 1 (process" in text, text[-3000:]
    assert "gives no sign of life" in text
    assert (folder / "pid1").read_text() in text
    assert "run_step" in text  # what rank 0 was doing
    assert took < runs.patience(6 + 3 + 2 * 3 + 3)  # the time given, a look, twice GRACE, the rest
    assert not alive(int((folder / "pid1").read_text()))


@pytest.mark.faults(20)
def test_a_child_that_raises_ends_the_parent(folder):
    process = start(folder, "raise")
    assert process.wait(600) not in (0, None)
    # twice GRACE, and what the processes take to end
    assert time.time() - float((folder / "begin").read_text()) < runs.patience(16)
    assert "bad on purpose" in (folder / "stderr").read_text()


@pytest.mark.faults(20)
def test_no_orphans_of_a_killed_parent(folder):
    process = start(folder, "nothing", workers=1)
    runs.wait_for(lambda: len(list((folder / "run").glob("images*.txt"))) == 2)
    family = children(process.pid)
    assert len(family) >= 4
    process.kill()
    process.wait()
    runs.wait_for(lambda: not any(map(alive, family)))


def fails(code, *words):
    """Run `code` in a process of its own, which ends with an error."""
    process = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=runs.patience(120),
        check=False,
    )
    assert process.returncode == 1
    return process


def alone(folder, workers):
    """Train in this process, where the mapper of one image never returns."""
    folder = Path(folder)
    tiny.register(folder / "images")

    class Stuck(tiny.TinyTrainer):
        @classmethod
        def build_train_loader(cls, cfg):
            mapper = DatasetMapper(cfg, is_train=True)

            def wait(record):
                if record["image_id"] == 3:
                    (folder / "begin").touch()
                    time.sleep(600)
                return mapper(record)

            return build_detection_train_loader(cfg, mapper=wait)

    cfg = tiny.tiny_cfg(folder / "run", "DATALOADER.NUM_WORKERS", int(workers))
    Stuck(cfg).train()


@pytest.mark.faults(20)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_single_process_whose_loader_is_stuck_ends(folder, workers):
    code = (
        "import sys; from datetime import timedelta; from d2kit.engine import launch\n"
        "from tests.faults.test_stuck import alone\n"
        "launch(alone, 0, args=(sys.argv[1], int(sys.argv[2])), timeout=timedelta(seconds=8))"
    )
    process = fails(code, folder, workers)
    assert "watchdog: this process has been in iteration" in process.stderr
    assert "run_step" in process.stderr  # what it was doing
    assert ("at work on record" in process.stderr) == bool(workers)
    assert ("3.png" in process.stderr) == bool(workers)


@pytest.mark.faults(20)
@pytest.mark.parametrize("workers", [0, 1])
def test_sigterm_ends_the_wait_of_a_stuck_loader(folder, workers):
    code = "import sys; from tests.faults.test_stuck import alone; alone(*sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder), str(workers)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        stderr=subprocess.PIPE,
        text=True,
    )
    runs.wait_for((folder / "begin").exists)
    time.sleep(2)  # the batches before it are done
    begin = time.time()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=runs.patience(60))
    assert process.returncode == 128 + signal.SIGTERM, errors[-3000:]
    assert time.time() - begin < runs.patience(10)
    assert "Traceback" not in errors
    for path in (folder / "run").glob(
        "model_0*.pth"
    ):  # none where the first batch is the stuck one
        state = torch.load(path, weights_only=True)
        assert state["iteration"] == int(path.stem[6:])


def evaluating(kind):
    """Evaluate, or compute a validation loss, of a loader that yields two images and no third."""

    def images():
        yield from ([{"image": torch.zeros(3, 8, 8)}] for _ in range(2))
        time.sleep(600)

    class Loader:
        __iter__ = staticmethod(images)
        __len__ = staticmethod(lambda: 3)

    class Model(torch.nn.Linear):
        def forward(self, batch):
            return {"loss": torch.zeros(())}

    if kind == "evaluation":
        inference_on_dataset(Model(2, 2), Loader(), DatasetEvaluators([]))
    else:
        validation_losses(Model(2, 2), Loader())


@pytest.mark.faults(20)
@pytest.mark.parametrize("kind", ["evaluation", "validation loss"])
def test_a_stuck_evaluation_ends(kind):
    code = (
        "import sys; from datetime import timedelta; from d2kit.engine import launch\n"
        "from tests.faults.test_stuck import evaluating\n"
        "launch(evaluating, 0, args=(sys.argv[1],), timeout=timedelta(seconds=8))"
    )
    process = fails(code, kind)
    assert "watchdog: this process has been in a" in process.stderr
    assert kind in process.stderr


if __name__ == "__main__":
    launch(
        two,
        0,
        args=(sys.argv[1], sys.argv[2], int(sys.argv[3])),
        num_processes=2,
        timeout=timedelta(seconds=6 if sys.argv[2] == "stop" else 600),
    )
