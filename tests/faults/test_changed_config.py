"""FAULTS 10: resuming under another config.

Fails without: `config=ConfigRecord(...)` of the checkpointer in `DefaultTrainer`.
"""

import logging

import pytest

from d2kit.engine.safety.run_lock import config_differences
from tests.support import tiny_run as tiny

pytestmark = pytest.mark.faults(10, fast=True)


@pytest.fixture
def run(folder):
    """The folder of a run that has trained four of its iterations."""
    trainer = tiny.TinyTrainer(tiny.tiny_cfg(folder / "run", "SOLVER.MAX_ITER", 4))
    trainer.train()
    return folder / "run"


def resumed(run, *options):
    trainer = tiny.TinyTrainer(tiny.tiny_cfg(run, *options))
    trainer.resume_or_load(resume=True)
    return trainer


@pytest.mark.parametrize(
    ("key", "value"),
    [("SOLVER.BASE_LR", 0.05), ("SOLVER.IMS_PER_BATCH", 1), ("INPUT.RANDOM_FLIP", "none")],
)
def test_what_changes_the_result_is_refused_unless_told(run, key, value, caplog):
    with pytest.raises(ValueError, match=rf"(?s){key}: .* -> {value!r}.*RESUME_CHANGED") as error:
        resumed(run, key, value)
    assert "SOLVER.MAX_ITER: 4 -> 12" in str(error.value)
    trainer = resumed(run, key, value, "RESUME_CHANGED", True)
    assert trainer.start_iter == 4


@pytest.mark.parametrize(
    ("key", "value"), [("DATALOADER.NUM_WORKERS", 2), ("TEST.EVAL_PERIOD", 5), ("SEED", 9)]
)
def test_the_rest_is_only_said(run, key, value, caplog):
    logging.getLogger("d2kit").addHandler(caplog.handler)
    try:
        assert resumed(run, key, value).start_iter == 4
    finally:
        logging.getLogger("d2kit").removeHandler(caplog.handler)
    assert f"-> {value}" in caplog.text


def test_differences():
    lines, harmful = config_differences(
        "{A: {B: 1, C: [1, 2]}, OUTPUT_DIR: x, OLD: 1}", "{A: {B: 2, C: [1, 2]}, OUTPUT_DIR: y}"
    )
    assert lines == ["A.B: 1 -> 2", "OLD: 1 -> '(no such key)'", "OUTPUT_DIR: 'x' -> 'y'"]
    assert harmful == ["A.B"]
    assert config_differences("{A: 1}", "{A: 1}") == ([], [])
