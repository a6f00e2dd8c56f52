"""Schedules in epochs."""

import pytest

from d2kit.config import get_cfg
from d2kit.engine._scaling import build_iterations_cfg
from tests.engine.tiny import TinyTrainer, records, register, tiny_cfg


def schedule(**keys):
    cfg = get_cfg()
    cfg.merge_from_list(["SOLVER.IMS_PER_BATCH", 2])
    for name, value in keys.items():
        cfg.merge_from_list([name.replace("__", "."), value])
    return cfg


@pytest.mark.parametrize(
    ("images", "epochs", "steps", "expected"),
    [
        (120, 10, (3, 6, 9), (600, (180, 360, 540))),
        (121, 2, (1,), (121, (60,))),
        (5, 0.5, (), (1, ())),
        (1, 1, (1,), (1, (0,))),
    ],
)
def test_epochs_become_iterations(images, epochs, steps, expected):
    cfg = schedule(SOLVER__MAX_EPOCHS=epochs, SOLVER__STEPS_EPOCHS=steps, TEST__EVAL_EPOCHS=1)
    cfg.freeze()
    found = build_iterations_cfg(cfg, images)
    iterations, at, period = found.SOLVER.MAX_ITER, found.SOLVER.STEPS, found.TEST.EVAL_PERIOD
    assert (iterations, at, period) == (*expected, max(1, round(images / 2)))
    assert found.is_frozen()
    assert cfg.SOLVER.MAX_ITER == 40000


def test_without_epochs_nothing_changes():
    cfg = schedule()
    assert build_iterations_cfg(cfg, None) is cfg


@pytest.mark.parametrize(
    ("keys", "images", "message"),
    [
        ({"SOLVER__MAX_EPOCHS": 2, "SOLVER__STEPS_EPOCHS": (3,)}, 10, "MAX_EPOCHS.*which is 2"),
        ({"SOLVER__STEPS_EPOCHS": (3,)}, 10, "which is 0"),
        ({"SOLVER__MAX_EPOCHS": -1}, 10, "which is -1"),
        ({"SOLVER__MAX_EPOCHS": 1}, None, "this one has none"),
    ],
)
def test_impossible_schedules_are_refused(keys, images, message):
    with pytest.raises(ValueError, match=message):
        build_iterations_cfg(schedule(**keys), images)


def test_trainer_counts_in_epochs_and_says_so(tmp_path, caplog):
    register(tmp_path)
    count = len(records(tmp_path))
    options = ["SOLVER.MAX_EPOCHS", 4, "SOLVER.STEPS_EPOCHS", (2,), "SOLVER.WARMUP_ITERS", 0]
    with caplog.at_level("INFO"):
        trainer = TinyTrainer(tiny_cfg(tmp_path / "out", *options))
        trainer.train()
    assert trainer.max_iter == 4 * count // 2
    assert f"{trainer.max_iter:,} iterations = 4.0 epochs over {count:,} images" in caplog.text
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
