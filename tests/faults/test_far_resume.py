"""FAULTS 7: resuming at step 90,000 costs nothing.

Fails without: `start_loader_at` in `DefaultTrainer.train` finding the place by indices (skipping
batches of the loader decodes 180,000 images).
"""

import time

import pytest

from d2kit.data import DatasetCatalog, detection_utils
from d2kit.engine import CallbackHook
from tests.support import fault_runs as runs
from tests.support import tiny_run as tiny

STEP = 90_000


class EnoughError(Exception):
    pass


def stop(trainer):
    raise EnoughError


def first_step(output):
    """Resume or start, do one step; return its number and the seconds until its end."""
    begin = time.perf_counter()
    trainer = tiny.TinyTrainer(tiny.tiny_cfg(output, "SOLVER.MAX_ITER", STEP + 2))
    trainer.register_hooks([CallbackHook(after_step=stop)])
    trainer.resume_or_load(resume=True)
    with pytest.raises(EnoughError):
        trainer.train()
    return trainer.iter, time.perf_counter() - begin


@pytest.mark.faults(7)
def test_first_step_at_90000(folder, monkeypatch):
    records = tiny.records(folder / "images")
    many = [{**records[i % len(records)], "image_id": i} for i in range(20_000)]
    DatasetCatalog.remove(tiny.NAME)
    DatasetCatalog.register(tiny.NAME, lambda: many)
    decoded = []
    read = detection_utils.read_image

    def count(name, format=None):
        decoded.append(name)
        return read(name, format=format)

    monkeypatch.setattr(detection_utils, "read_image", count)
    first_step(folder / "warm")  # imports
    decoded.clear()
    step, fresh = first_step(folder / "fresh")
    assert (step, len(decoded)) == (0, 2)

    trainer = tiny.TinyTrainer(tiny.tiny_cfg(folder / "run", "SOLVER.MAX_ITER", STEP + 2))
    trainer.iter = STEP - 1
    trainer.checkpointer.save(f"model_{STEP - 1:07d}", iteration=STEP - 1)
    decoded.clear()
    step, resumed = first_step(folder / "run")
    assert (step, len(decoded)) == (STEP, 2)
    assert resumed - fresh < runs.patience(1)
