import logging

import pytest
import torch
from torch import nn

from d2kit.evaluation import (
    DatasetEvaluator,
    DatasetEvaluators,
    inference_context,
    inference_on_dataset,
)
from d2kit.evaluation.evaluator import results_file
from d2kit.modeling.postprocessing import detector_postprocess
from d2kit.structures import Boxes, Instances, ROIMasks
from d2kit.utils.events import EventStorage


class Sum(DatasetEvaluator):
    """Adds up the outputs."""

    def __init__(self, task="sum"):
        self.task = task
        self.total = -1

    def reset(self):
        self.total = 0

    def process(self, inputs, outputs):
        assert len(inputs) == len(outputs)
        self.total += sum(outputs)

    def evaluate(self):
        return {self.task: {"total": self.total}}


class Doubling(nn.Module):
    def __init__(self):
        super().__init__()
        self.frozen = nn.BatchNorm1d(2).eval()
        self.modes = []

    def forward(self, batch):
        self.modes.append((self.training, torch.is_grad_enabled()))
        return [2 * item for item in batch]


LOADER = [[1, 2], [3], [4, 5]]


def test_results_and_mode():
    model = Doubling()
    assert inference_on_dataset(model, LOADER, Sum()) == {"sum": {"total": 30}}
    assert model.modes == [(False, False)] * 3
    assert model.training
    assert not model.frozen.training


def test_several_evaluators():
    results = inference_on_dataset(Doubling(), LOADER, [Sum("a"), Sum("b")])
    assert results == {"a": {"total": 30}, "b": {"total": 30}}


def test_same_task_twice():
    with pytest.raises(ValueError, match="'a'"):
        inference_on_dataset(Doubling(), LOADER, DatasetEvaluators([Sum("a"), Sum("a")]))


def test_without_evaluator_and_with_plain_function():
    assert inference_on_dataset(lambda batch: batch, LOADER, None) == {}


def test_loader_without_length():
    assert inference_on_dataset(Doubling(), iter(LOADER), Sum()) == {"sum": {"total": 30}}


def test_empty_loader():
    assert inference_on_dataset(Doubling(), [], Sum()) == {"sum": {"total": 0}}


def test_nothing_returned():
    assert inference_on_dataset(Doubling(), LOADER, DatasetEvaluator()) == {}


def test_mode_after_exception():
    model = Doubling()

    def broken():
        yield [1]
        raise RuntimeError("loader")

    with pytest.raises(RuntimeError, match="loader"):
        inference_on_dataset(model, broken(), Sum())
    assert model.training
    assert not model.frozen.training


@pytest.mark.parametrize("training", [True, False])
def test_inference_context(training):
    model = nn.Linear(1, 1).train(training)
    with inference_context(model):
        assert not model.training
    assert model.training == training


def test_callbacks():
    calls = []
    names = ["on_start", "before_inference", "after_inference", "on_end"]
    callbacks = {name: lambda name=name: calls.append(name) for name in names}
    inference_on_dataset(Doubling(), LOADER, None, callbacks)
    assert calls == [names[0], *names[1:3] * 3, names[3]]


def test_timing_is_logged(caplog):
    with caplog.at_level("INFO", logger="d2kit"):
        inference_on_dataset(Doubling(), LOADER, None)
    assert "s/img" in caplog.text
    assert "compute" in caplog.text


class Pasting(nn.Module):
    """Returns one detection whose mask goes through post-processing."""

    def forward(self, batch):
        raw = Instances(
            (20, 30),
            pred_boxes=Boxes(torch.tensor([[2.0, 3, 20, 15]])),
            pred_masks=torch.ones(1, 1, 28, 28),
        )
        return [{"instances": detector_postprocess(raw, 40, 60)} for _ in batch]


class Kinds(DatasetEvaluator):
    accepts_roi_masks = True

    def reset(self):
        self.kinds = []

    def process(self, inputs, outputs):
        self.kinds += [type(output["instances"].pred_masks) for output in outputs]


class PlainKinds(Kinds):
    accepts_roi_masks = False


def test_masks_are_pasted_unless_every_evaluator_does_without():
    for evaluators, kind in (
        ([Kinds()], ROIMasks),
        ([Kinds(), PlainKinds()], torch.Tensor),
    ):
        inference_on_dataset(Pasting(), [[1], [2]], evaluators)
        assert [e.kinds for e in evaluators] == [[kind] * 2] * len(evaluators)
    assert Pasting()([1])[0]["instances"].pred_masks.shape == (1, 40, 60)


@pytest.mark.parametrize("place", ["open", "write"])
def test_results_that_cannot_be_written_end_no_training(tmp_path, monkeypatch, caplog, place):
    """Nor do those of an earlier evaluation pass for them; without a training it is an error."""
    with results_file(tmp_path, "a.json", "set") as file:
        file.write("old")
    (tmp_path / "b.json").write_text("old")
    if place == "open":
        monkeypatch.setattr("d2kit.evaluation.evaluator.atomic_write", refused)
    else:
        monkeypatch.setattr("os.fsync", lambda _: refused())
    logging.getLogger("d2kit").addHandler(caplog.handler)
    with EventStorage(), results_file(tmp_path, "a.json", "set") as file:
        file.write("new")
    logging.getLogger("d2kit").removeHandler(caplog.handler)
    assert "a.json could not be written" in caplog.text
    assert not (tmp_path / "a.json").exists()
    full = pytest.raises(OSError, match="No space left|disk full")
    with full, results_file(tmp_path, "b.json", "set") as file:
        file.write("new")
    assert (tmp_path / "b.json").read_text() == "old"


def refused(*_):
    raise OSError(28, "No space left on device")
