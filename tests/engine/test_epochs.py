"""Schedules in epochs."""

import pytest

from d2kit.config import get_cfg
from d2kit.engine.resolve import build_iterations_cfg
from d2kit.visualization.plots import (
    EPOCH_LOSS,
    epoch_rows,
    plot_epochs,
    read_metrics,
    table_of_epochs,
)
from tests.support.tiny_run import EvaluatedTrainer, TinyTrainer, records, register, tiny_cfg


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
        (120, 2, (3, 6), (120, ())),
        (120, 4, (3, 6), (240, (180,))),
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
        ({"SOLVER__MAX_EPOCHS": 2, "SOLVER__STEPS_EPOCHS": (0,)}, 10, "expected positive"),
        ({"SOLVER__STEPS_EPOCHS": (3,)}, 10, "which is 0"),
        ({"SOLVER__MAX_EPOCHS": -1}, 10, "MAX_EPOCHS -1: expected positive"),
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


class Heard(EvaluatedTrainer):
    """Notes the loss of each iteration; a killed run stops in the middle of the second epoch."""

    killed = False
    losses: list[float] = []

    def after_step(self):
        self.losses.append(self.storage.latest()["total_loss"][0])
        super().after_step()
        if self.killed and self.iter == 5:
            raise KeyboardInterrupt


def test_loss_and_metrics_of_each_epoch(tmp_path, caplog):
    """Seven images, two in a batch: epochs end after 4 and 7 iterations."""
    register(tmp_path)
    options = ["SOLVER.MAX_EPOCHS", 2, "TEST.EVAL_EPOCHS", 1, "SOLVER.WARMUP_ITERS", 0]
    Heard.losses = []
    with caplog.at_level("INFO"):
        trainer = Heard(tiny_cfg(tmp_path / "whole", *options, "SOLVER.CHECKPOINT_PERIOD", 3))
        trainer.train()
    rows = epoch_rows(read_metrics(tmp_path / "whole/metrics.json"), 3.5, trainer.max_iter)
    assert [(row["epoch"], row["iterations"]) for row in rows] == [(1, 4), (2, 7)]
    parts = (Heard.losses[:4], Heard.losses[4:])
    means = [sum(part) / len(part) for part in parts]
    assert [row[EPOCH_LOSS] for row in rows] == pytest.approx(means)
    assert all(0 < row["bbox/AP"] < 100 for row in rows)
    assert f"|       2 |            7 |           {means[1]:.3f}" in caplog.text
    assert (tmp_path / "whole/epochs.png").read_bytes()[:4] == b"\x89PNG"

    killed = Heard(tiny_cfg(tmp_path / "killed", *options, "SOLVER.CHECKPOINT_PERIOD", 3))
    killed.killed = True
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = Heard(tiny_cfg(tmp_path / "killed", *options, "SOLVER.CHECKPOINT_PERIOD", 3))
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 6
    resumed.train()
    again = epoch_rows(read_metrics(tmp_path / "killed/metrics.json"), 3.5, 7)
    assert again == rows, "the loss of an epoch goes on where the checkpoint was"


def test_epochs_are_shown(tmp_path):
    """Parts of epochs, datasets with a name before the metric, what was not finite."""
    written = [
        {"iteration": 29, EPOCH_LOSS: 2.0, "lr": 1.0},
        {"iteration": 59, EPOCH_LOSS: 1.5, "val/bbox/AP": 40.0, "other/bbox/AP": 1.0},
        {"iteration": 61, "val/segm/AP": 30.0},  # a period of whole iterations drifts from epochs
        {"iteration": 74, EPOCH_LOSS: None},
        {"iteration": 75, "val/bbox/AP": 50.0},
    ]
    rows = epoch_rows(written, 30.0, 75)
    assert [row["epoch"] for row in rows] == [1, 2, 2.5]
    lines = table_of_epochs(rows).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == [
        *("epoch", "iterations", "training loss", "box AP", "mask AP")
    ]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert cells == [
        ["1", "30", "2.000", "", ""],
        ["2", "60", "1.500", "40.0", "30.0"],
        ["2.5", "75", "nan", "50.0", ""],
    ]
    assert plot_epochs(rows, tmp_path / "e.png").stat().st_size > 5000
