"""The losses on a test set: their values, and that the model is afterwards as it was."""

import copy
import json

import pytest
import torch

from d2kit.engine import launch
from d2kit.engine.evaluate import validation_losses
from d2kit.utils import comm
from d2kit.utils.events import EventStorage
from tests.support import tiny_run as tiny
from tests.support.tiny_dense import labelled_input, tiny_dense_model

IMAGES = [labelled_input(seed, objects) for seed, objects in ((0, 1), (1, 3), (2, 2))]


def batches(images=IMAGES):
    return [[sample] for sample in images]


def test_mean_of_the_losses_of_single_images():
    model = tiny_dense_model("FCOS")
    expected = {}
    with EventStorage(), torch.no_grad():
        for batch in batches():
            fresh = copy.deepcopy(model)  # a running count goes into its losses
            for name, value in fresh(batch).items():
                expected[name] = expected.get(name, 0.0) + float(value) / len(IMAGES)
    found = validation_losses(model, batches())
    assert found.pop("total_loss") == pytest.approx(sum(expected.values()), rel=1e-5)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", ["RetinaNet", "tiny"])
def test_the_model_is_as_before_and_the_numbers_repeat(name, train):
    """RetinaNet has a running count; the tiny model BatchNorm and dropout."""
    model = tiny_dense_model(name) if name == "RetinaNet" else tiny.TinyModel()
    model.train(train)
    kept = [m for m in model.modules() if hasattr(m, "training_state")]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    states = [m.training_state() for m in kept]
    modes = [m.training for m in model.modules()]
    generator = torch.get_rng_state()
    first = validation_losses(model, batches())
    torch.rand(5)
    assert validation_losses(model, batches()) == first
    assert set(first) > {"total_loss"}
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert str([m.training_state() for m in kept]) == str(states)
    torch.set_rng_state(generator)
    validation_losses(model, batches())
    assert torch.equal(torch.get_rng_state(), generator)


def test_no_image_is_an_error():
    with pytest.raises(ValueError, match="no image"):
        validation_losses(tiny_dense_model("FCOS"), [])


def two_processes(path):
    """Two images for one process, one for the other: not in step."""
    own = IMAGES[:2] if comm.get_rank() == 0 else IMAGES[2:]
    found = validation_losses(tiny_dense_model("RetinaNet"), batches(own))
    assert bool(found) == comm.is_main_process()
    if found:
        with open(path, "w") as file:
            json.dump(found, file)


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path):
    launch(two_processes, 0, args=(str(tmp_path / "found.json"),), num_processes=2)
    expected = validation_losses(tiny_dense_model("RetinaNet"), batches())
    assert json.loads((tmp_path / "found.json").read_text()) == pytest.approx(expected, rel=1e-5)


def test_key_of_the_config(tmp_path):
    (tmp_path / "images").mkdir()
    tiny.register(tmp_path / "images")
    cfg = tiny.tiny_cfg(
        *(tmp_path / "run", "TEST.VALIDATION_LOSS", True, "DATASETS.TEST", (tiny.NAME,)),
        *("INPUT.MIN_SIZE_TEST", tiny.SIZE, "TEST.EVAL_PERIOD", 2, "SOLVER.MAX_ITER", 4),
        *("TEST.BEST_METRIC", "validation/total_loss"),
    )
    trainer = tiny.EvaluatedTrainer(cfg)
    results = trainer.train()
    assert set(results["validation"]) == {"total_loss", "loss_box", "loss_cls"}
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.json").read_text().splitlines()]
    values = [row["validation/total_loss"] for row in rows if "validation/total_loss" in row]
    assert values[-1] == pytest.approx(results["validation"]["total_loss"])
    best = torch.load(tmp_path / "run" / "model_best.pth", weights_only=True)
    histories = trainer.storage.history("validation/total_loss").values()
    kept = best["trainer"]["hooks"]["BestCheckpointer"]["best_metric"]
    assert kept == min(value for value, _ in histories)
