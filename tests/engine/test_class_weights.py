"""Weights of the classes in the loss, by config."""

import logging

import pytest
import torch

from d2kit.config import get_cfg
from d2kit.engine import CallbackHook, DefaultTrainer
from d2kit.engine.resolve import balanced_weights, build_class_weights_cfg
from d2kit.modeling import build_model
from tests.support import rcnn_data
from tests.support import tiny_run as tiny
from tests.support.tiny_dense import tiny_dense_config
from tests.support.tiny_model import tiny_config

BALANCED = ("MODEL.ROI_HEADS.CLASS_WEIGHTS", "balanced")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    rcnn_data.register(tmp_path_factory.mktemp("weights"))
    yield
    rcnn_data.forget()


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({0: 5, 1: 5}, [1.0, 1.0]),
        ({0: 90, 1: 10}, [0.555556, 5.0]),
        ({0: 6, 1: 3, 2: 1}, [0.555556, 1.11111, 3.33333]),
        ({1: 4}, [1.0, 1.0, 1.0]),
        ({0: 3, 2: 1}, [0.666667, 1.0, 2.0]),
    ],
)
def test_balanced(counts, expected):
    found = balanced_weights(counts, len(expected))
    assert found == expected
    total = sum(counts.values())
    assert sum(found[c] * n for c, n in counts.items()) / total == pytest.approx(1, rel=1e-5)


def test_balanced_comes_from_the_training_set(dataset, tmp_path, caplog):
    cfg = rcnn_data.training_config(tmp_path, *BALANCED)
    cfg.freeze()
    loader = DefaultTrainer.build_train_loader(cfg)
    with caplog.at_level(logging.INFO):
        found = build_class_weights_cfg(cfg, loader)
    records = [loader.dataset.dataset.record(i) for i in range(4)]  # type: ignore[attr-defined]
    classes = [a["category_id"] for r in records for a in r["annotations"]]
    counts = {c: classes.count(c) for c in set(classes)}
    assert len(set(counts.values())) > 1
    assert balanced_weights(counts, 3) == found.MODEL.ROI_HEADS.CLASS_WEIGHTS
    assert found.is_frozen()
    assert f"balanced over {len(classes)} objects" in caplog.text
    assert build_class_weights_cfg(found, loader) is found
    again = get_cfg()
    again.merge_from_other_cfg(found)  # a config.yaml with the numbers
    assert again.MODEL.ROI_HEADS.CLASS_WEIGHTS == found.MODEL.ROI_HEADS.CLASS_WEIGHTS


@pytest.mark.parametrize(
    ("value", "message"), [("median", "expected a list, 'balanced'"), ("balanced", "of records")]
)
def test_what_cannot_be_balanced_is_named(dataset, tmp_path, value, message):
    cfg = rcnn_data.training_config(tmp_path, BALANCED[0], value)
    with pytest.raises(ValueError, match=message):
        build_class_weights_cfg(cfg, [])


@pytest.mark.parametrize("name", ["RetinaNet", "FCOS", "SemanticSegmentor", "ProposalNetwork"])
@pytest.mark.parametrize("weights", [[1.0, 2.0, 3.0], "balanced"])
def test_models_that_use_no_class_weights_refuse_them(name, weights):
    if name == "ProposalNetwork":
        cfg = tiny_config("MODEL.META_ARCHITECTURE", name)
    else:
        cfg = tiny_dense_config(name)
    cfg.MODEL.ROI_HEADS.CLASS_WEIGHTS = weights
    with pytest.raises(ValueError, match=f"nothing in {name} uses it"):
        build_model(cfg)


def state_at(trainer):
    return tiny.digest([trainer.model.state_dict(), trainer.optimizer.state_dict()])


class KilledError(Exception):
    pass


def run(output, *options, resume=False, kill_at=None):
    def kill(trainer):
        if trainer.iter == kill_at:
            raise KilledError

    options = ("SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2, "DATASETS.TEST", (), *options)
    torch.manual_seed(0)
    trainer = rcnn_data.Trainer(rcnn_data.training_config(output, *options))
    trainer.register_hooks([CallbackHook(before_step=kill)])
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def test_a_resumed_run_is_equal_and_keeps_the_weights(dataset, tmp_path):
    straight = run(tmp_path / "straight", *BALANCED)
    with pytest.raises(KilledError):
        run(tmp_path / "killed", *BALANCED, kill_at=3)
    resumed = run(tmp_path / "killed", *BALANCED, resume=True)
    assert resumed.start_iter == 2
    assert state_at(resumed) == state_at(straight)
    assert state_at(run(tmp_path / "without")) != state_at(straight)
    weights = straight.cfg.MODEL.ROI_HEADS.CLASS_WEIGHTS
    other = [2 * weight for weight in weights]
    with pytest.raises(ValueError, match=r"MODEL\.ROI_HEADS\.CLASS_WEIGHTS: \["):
        run(tmp_path / "killed", BALANCED[0], other, resume=True)
