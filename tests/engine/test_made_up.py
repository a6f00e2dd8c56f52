"""What a kill cost is made up for: evaluations, lines of metrics.json; signals in evaluations."""

import json
import os
import shutil
import signal
import time

import pytest

from d2kit.engine import CallbackHook
from d2kit.engine.hooks import EvalHook, PeriodicWriter
from d2kit.utils import stopping
from tests.support import fault_runs as runs
from tests.support import tiny_run as tiny

PERIOD = 4
PERIODS = ("SOLVER.CHECKPOINT_PERIOD", 4, "TEST.EVAL_PERIOD", PERIOD, "SOLVER.MAX_ITER", 12)
KILLED_AT = 8


def rows(folder):
    """Return iteration and names of each line, without what is measured."""
    lines = (folder / "metrics.json").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    unsteady = ("time", "eta", "memory")
    return [
        {k: v for k, v in row.items() if not any(word in k for word in unsteady)} for row in found
    ]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    tiny.register(tmp_path / "images")
    tiny.records(tmp_path / "images")
    return tmp_path


class Killed(Exception):
    """Ends a training whose folder, as a SIGKILL would leave it, has been copied."""


class Writing(tiny.EvaluatedTrainer):
    """Writes a line every fourth iteration: with checkpoint and evaluation."""

    def build_hooks(self):
        found = super().build_hooks()
        return [*found[:-1], PeriodicWriter(self.build_writers(), PERIOD)]


def killed(folder, where):
    """Train in ``first``; leave in ``run`` what a kill in the second evaluation or later leaves."""

    def die():
        shutil.copytree(folder / "first", folder / "run")
        raise Killed

    class Dying(Writing):
        evaluations = 0

        @classmethod
        def test(cls, cfg, model, evaluators=None):
            cls.evaluations += 1
            if where == "evaluation" and cls.evaluations == 2:
                die()
            return super().test(cfg, model, evaluators)

        def build_hooks(self):
            found = super().build_hooks()
            hook = CallbackHook(after_step=lambda t: t.iter + 1 == KILLED_AT and die())
            if where != "evaluation":
                found.insert(len(found) - (where == "before the line"), hook)
            return found

    with pytest.raises(Killed):
        train(Dying, folder / "first")
    return folder / "run"


def train(kind, output):
    trainer = kind(tiny.tiny_cfg(output, *PERIODS))
    trainer.resume_or_load(resume=True)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The folder of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("straight")
    (folder / "images").mkdir()
    tiny.register(folder / "images")
    tiny.records(folder / "images")
    train(Writing, folder / "run")
    wanted = rows(folder / "run")
    assert [row["iteration"] for row in wanted] == [3, 7, 11, 12]
    assert all("bbox/AP" in row for row in wanted if row["iteration"] != 11)
    return folder / "run"


@pytest.mark.faults(39, fast=True)
@pytest.mark.parametrize("where", ["evaluation", "before the line", "after the line"])
def test_metrics_are_those_of_the_undisturbed_run(folder, straight, where):
    run = killed(folder, where)
    assert train(Writing, run).start_iter == KILLED_AT
    assert rows(run) == rows(straight)
    assert tiny.final_state(run) == tiny.final_state(straight)


@pytest.mark.parametrize(
    ("period", "start", "evaluated", "missed"),
    [(4, 8, -1, True), (4, 8, 4, True), (4, 8, 8, False), (4, 7, 4, False), (0, 8, -1, False)],
)
def test_which_evaluation_was_missed(period, start, evaluated, missed):
    hook = EvalHook(period, dict, remember=True)
    hook.evaluated = evaluated
    assert hook.missed(start) == missed
    assert not EvalHook(period, dict).missed(start)
    assert not hook.missed(0)


@pytest.mark.parametrize("line", [b"\xff\xfe garbage\n", b'{"iteration": \n', b"[1, 2]\n", b"\n"])
def test_a_damaged_line_does_not_hinder_a_resume(folder, straight, line):
    run = killed(folder, "before the line")
    path = run / "metrics.json"
    path.write_bytes(line + path.read_bytes() + b'{"iteration": 7, "total')
    train(Writing, run)
    assert rows(run) == rows(straight)


@pytest.mark.faults(39, fast=True)
def test_a_whole_line_without_its_end_stays(folder, straight):
    """The kill came between the last two bytes of a line."""
    run = killed(folder, "after the line")
    path = run / "metrics.json"
    path.write_bytes(path.read_bytes().removesuffix(b"\n"))
    train(Writing, run)
    assert rows(run) == rows(straight)


# ---- signals in evaluations


def stopped(folder, number, variables=()):
    """Train; in the first evaluation the process asks itself to stop, and goes on with images."""
    os.environ.update(variables)
    signal.signal(number, signal.SIG_DFL)  # tests under nohup ignore SIGHUP, and so would this

    class Slow(tiny.TinyTrainer):
        @classmethod
        def test(cls, cfg, model, evaluators=None):
            os.kill(os.getpid(), number)
            for _ in range(6000):  # ten minutes of images
                stopping.leave_if_asked()
                time.sleep(0.1)
            return {}

    tiny.register(folder / "images")
    options = ("TEST.EVAL_PERIOD", 5, "SOLVER.CHECKPOINT_PERIOD", 1000, "SOLVER.MAX_ITER", 12)
    trainer = Slow(tiny.tiny_cfg(folder / "run", *options))
    trainer.resume_or_load(resume=True)
    trainer.train()


@pytest.mark.faults(17)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_in_an_evaluation_stops_it_with_the_last_step_saved(folder, number):
    start = time.monotonic()
    assert runs.finish(runs.start(stopped, folder, number)) == 128 + number
    assert time.monotonic() - start < runs.patience(60)
    assert [p.name for p in (folder / "run").glob("*.pth")] == ["model_0000004.pth"]
    trainer = tiny.TinyTrainer(tiny.tiny_cfg(folder / "run"))
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 5


@pytest.mark.faults(17, fast=True)
def test_an_evaluation_looks_between_two_images(folder):
    """`inference_on_dataset` leaves at the next image; nothing is asked after it has."""
    import torch

    from d2kit.evaluation import DatasetEvaluators, inference_on_dataset

    seen = []

    class Model(torch.nn.Module):
        def forward(self, batch):
            seen.append(batch)
            if len(seen) == 2:
                stopping.ask(signal.SIGTERM)
            return batch

    try:
        with pytest.raises(stopping.StopAsked, match="SIGTERM"):
            inference_on_dataset(Model(), [[{}]] * 5, DatasetEvaluators([]))
    finally:
        stopping.forget()
    assert len(seen) == 2
    stopping.leave_if_asked()
