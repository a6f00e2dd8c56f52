"""What a module keeps beside its weights survives a checkpoint of the training."""

import io
import itertools

import torch

from d2kit.engine import SimpleTrainer
from tests.support.tiny_dense import labelled_input, tiny_dense_model
from tests.support.tiny_run import digest


def trainer():
    model = tiny_dense_model("RetinaNet")
    batches = itertools.cycle([[labelled_input(0), labelled_input(1, 5)], [labelled_input(2, 1)]])
    return SimpleTrainer(model, batches, torch.optim.SGD(model.parameters(), lr=0.01))


def test_the_divisor_of_a_loss_goes_on_after_a_resume():
    straight = trainer()
    straight.train(0, 4)

    first = trainer()
    first.train(0, 2)
    saved = {"trainer": first.state_dict(), "model": first.model.state_dict()}
    assert set(saved["trainer"]["modules"]) == {"loss_normalizer"}
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = trainer()
    second.model.load_state_dict(saved["model"])
    second.load_state_dict(saved["trainer"])
    second.train(2, 4)

    assert digest(second.model.state_dict()) == digest(straight.model.state_dict())
    average = straight.model.loss_normalizer.average
    assert torch.equal(second.model.loss_normalizer.average, average)
    assert average != trainer().model.loss_normalizer.average


def test_a_state_without_such_modules_is_read():
    """As of Detectron2, or of a training before there were any."""
    fresh = trainer()
    fresh.train(0, 1)
    state = fresh.state_dict()
    del state["modules"]
    trainer().load_state_dict(state)
