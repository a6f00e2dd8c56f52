"""FAULTS 1, 5, 19: kills at named places, and what is left is what an undisturbed run leaves.

Weights, state, averages, best checkpoint and ``metrics.json``, whose every value that is not
measured is compared. Checkpoint, evaluation and line come at the same iteration. Seven places in
CI; ``D2KIT_KILLS=30 pytest -m faults tests/faults/test_thirty_kills.py`` for all.

Fails without: `repeat_missed_evaluation`, `_latest` in `EventStorage.load_state_dict` (a made-up
line lacks its losses), `_append`'s cut of an unfinished line, `atomic_write` in the checkpointer.
"""

import json
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from d2kit.checkpoint import DetectionCheckpointer
from d2kit.engine import CallbackHook, launch
from d2kit.engine.hooks import (
    BestCheckpointer,
    EvalHook,
    PeriodicCheckpointer,
    PeriodicWriter,
    WeightAveraging,
)
from d2kit.utils import comm
from d2kit.utils import events as event_storage
from d2kit.utils.events import JSONWriter
from tests.support import fault_runs as runs
from tests.support import tiny_run as tiny

PERIOD = 4
MEASURED = re.compile("time|eta|second|memory")
OPTIONS = (
    *("SOLVER.MAX_ITER", 16, "SOLVER.CHECKPOINT_PERIOD", PERIOD, "TEST.EVAL_PERIOD", PERIOD),
    *("TEST.BEST_METRIC", "bbox/AP", "SOLVER.EMA.ENABLED", True, "SOLVER.EMA.DECAY", 0.7),
    *("SOLVER.ACCUMULATE_STEPS", 2, "SOLVER.EARLY_STOPPING.PATIENCE", 9),
)
KILLS = int(os.environ.get("D2KIT_KILLS", "7"))


class Trainer(tiny.EvaluatedTrainer):
    """Writes every fourth iteration, keeps two checkpoints."""

    def build_hooks(self):
        found = super().build_hooks()
        for hook in found:
            if isinstance(hook, PeriodicCheckpointer):
                hook.max_to_keep = 2
        if not comm.is_main_process():  # has no writers
            return found
        assert isinstance(found[-1], PeriodicWriter)
        return [*found[:-1], PeriodicWriter(self.build_writers(), PERIOD)]


class QuietTrainer(Trainer):
    noise = False


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def at(owner, name, count, *, behind=False):
    """Return what lets this process die at the `count`-th call of a function, or behind it."""

    def install():
        inner, calls = getattr(owner, name), []

        def dying(*args, **kwargs):
            calls.append(1)
            if len(calls) == count and not behind:
                die()
            result = inner(*args, **kwargs)
            if len(calls) == count:
                die()
            return result

        setattr(owner, name, dying)

    return install


def inside_a_line(count, share):
    """Return what writes a share of the `count`-th lines of ``metrics.json``, and dies."""

    def install():
        inner, calls = event_storage._append, []

        def append(path, lines):
            calls.append(1)
            if len(calls) == count:
                with open(path, "ab") as file:
                    file.write(lines[: int(len(lines) * share)])
                die()
            inner(path, lines)

        event_storage._append = append

    return install


def in_evaluation(count, *, behind=False):
    """Return what lets this process die as the metrics of the `count`-th evaluation are made."""

    def install():
        inner, calls = Trainer.test.__func__, []

        def test(cls, cfg, model, evaluators=None):
            calls.append(1)
            result = inner(cls, cfg, model, evaluators)
            if len(calls) == count:
                die()
            return result

        Trainer.test = classmethod(test)

    return install if not behind else at(EvalHook, "_do_eval", count, behind=True)


PLACES = {
    "evaluation 2": in_evaluation(2),
    "behind evaluation 2": in_evaluation(2, behind=True),
    "half a line": inside_a_line(2, 0.5),
    "before the best": at(BestCheckpointer, "_best_checking", 2),
    "behind the name of a checkpoint": at(os, "replace", 3, behind=True),
    "old ones deleted": at(PeriodicCheckpointer, "_delete_oldest", 3),
    "last evaluation": in_evaluation(4),
    "evaluation 1": in_evaluation(1),
    "evaluation 3": in_evaluation(3),
    "behind evaluation 3": in_evaluation(3, behind=True),
    "behind the last evaluation": in_evaluation(4, behind=True),
    "first line not begun": inside_a_line(1, 0),
    "one byte of a line": inside_a_line(3, 0.01),
    "a line without its end": inside_a_line(3, 0.999),
    "a whole line": inside_a_line(2, 1),
    "behind the best": at(BestCheckpointer, "_best_checking", 1, behind=True),
    "between average and best": at(WeightAveraging, "save", 2, behind=True),
    "before a checkpoint": at(DetectionCheckpointer, "save", 3),
    "behind a checkpoint": at(DetectionCheckpointer, "save", 2, behind=True),
    "before a name": at(os, "replace", 5),
    "before the writer": at(JSONWriter, "write", 2),
    "the end of a training": at(WeightAveraging, "after_train", 1),
}
RANDOM = [f"random {i}" for i in range(max(0, min(KILLS - len(PLACES), 8)))]
NAMES = [*list(PLACES)[:KILLS], *RANDOM]


def doomed(folder, place):
    PLACES[place]()
    runs.train(folder, "run", OPTIONS, kind=Trainer)


def content(folder):
    """Return what a run has left: file -> digest, and the lines of ``metrics.json``."""
    found = {}
    for path in sorted(folder.glob("*.pth")):
        saved = torch.load(path, weights_only=True)
        found[path.name] = {k: tiny.digest(saved[k]) for k in ("model", "trainer", "iteration")}
    for path in sorted(folder.glob("*.safetensors")):
        found[path.name] = tiny.digest(load_file(path))
    rows = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    found["metrics"] = [{k: v for k, v in r.items() if not MEASURED.search(k)} for r in rows]
    return found


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    (folder / "images").mkdir()
    tiny.register(folder / "images")
    tiny.records(folder / "images")
    runs.train(folder, "run", OPTIONS, kind=Trainer)
    found = content(folder / "run")
    assert [row["iteration"] for row in found["metrics"]] == [3, 7, 11, 15, 16]
    assert {"model_best.pth", "model_best_ema.safetensors", "model_final.pth"} <= set(found)
    assert "model_final_ema.safetensors" in found
    return found


@pytest.mark.faults(1, 5)
@pytest.mark.parametrize("place", NAMES)
def test_a_kill_changes_nothing(folder, straight, place):
    if place in PLACES:
        code = runs.finish(runs.start(doomed, folder, place))
    else:
        rng = random.Random(place)
        code = runs.kill_at_random(folder, "run", OPTIONS, rng.randrange(15), rng, Trainer)
    assert code == -signal.SIGKILL, "it was not killed"
    again = runs.start(resumed, folder)
    assert runs.finish(again) == 0
    found = content(folder / "run")
    assert found["metrics"] == straight["metrics"]
    assert found == straight


def resumed(folder):
    runs.train(folder, "run", OPTIONS, kind=Trainer)


def two(folder, output, place):
    """Train in two processes; rank 1 dies at a place, the first time."""
    mark = Path(folder) / "killed"
    if place and comm.get_rank() == 1 and not mark.exists():
        mark.write_text("")
        if place == "evaluation":
            in_evaluation(2)()
        else:
            hook = CallbackHook(before_step=lambda t: t.iter == 9 and die())
            build = QuietTrainer.build_hooks
            QuietTrainer.build_hooks = lambda self: [hook, *build(self)]
    options = (*OPTIONS, "SOLVER.ACCUMULATE_STEPS", 1)  # one image a process
    runs.train(folder, output, options, kind=QuietTrainer, noise=False)


@pytest.mark.faults(19)
@pytest.mark.parametrize("place", ["step", "evaluation"][-1 if KILLS < 30 else 0 :])
def test_a_kill_of_rank_1_changes_nothing(folder, place):
    launch(two, 0, args=(str(folder), "straight", ""), num_processes=2)
    start = time.monotonic()
    with pytest.raises((torch.multiprocessing.ProcessExitedException, SystemExit)):
        launch(two, 0, args=(str(folder), "run", place), num_processes=2)
    assert (folder / "killed").exists()
    assert time.monotonic() - start < runs.patience(60)
    launch(two, 0, args=(str(folder), "run", ""), num_processes=2)
    found, wanted = content(folder / "run"), content(folder / "straight")
    assert found["metrics"] == wanted["metrics"]
    assert found == wanted
