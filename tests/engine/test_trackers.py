"""Tracking services that a config switches on."""

import importlib.util

import pytest

from d2kit.engine.setup import build_tracker_writers
from d2kit.utils import remote_writers as _remote_writers
from d2kit.utils.remote_writers import RemoteWriter
from tests.support import tiny_run as tiny

BOTH = ("WRITERS.WANDB.ENABLED", True, "WRITERS.MLFLOW.ENABLED", True)


class Memory(RemoteWriter):
    """Keeps what it is sent."""

    service = "memory"
    rows = ()

    def _start(self, run_id):
        self.rows = []
        return run_id or "run"

    def _send(self, step, scalars, pictures):
        self.rows.append((step, scalars["total_loss"]))

    def _finish(self, failed):
        self.failed = failed


class Trainer(tiny.TinyTrainer):
    def build_writers(self):
        self.memory = Memory(self.cfg.OUTPUT_DIR)
        return [self.memory, *super().build_writers()]


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    tiny.register(folder)


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_a_missing_package_is_named_before_the_data_are_read(tmp_path, package, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        _remote_writers.importlib.util,
        "find_spec",
        lambda name: None if name == package else real(name),
    )
    options = (f"WRITERS.{package.upper()}.ENABLED", True, "DATASETS.TRAIN", ("not registered",))
    with pytest.raises(ValueError, match=rf"pip install d2kit\[{package}\]"):
        tiny.TinyTrainer(tiny.tiny_cfg(tmp_path, *options))


def test_writers_are_those_of_the_config(tmp_path):
    assert build_tracker_writers(tiny.tiny_cfg(tmp_path)) == []
    options = (*BOTH, "WRITERS.MLFLOW.EXPERIMENT", "e", "WRITERS.WANDB.MODE", "offline")
    wandb, mlflow = build_tracker_writers(tiny.tiny_cfg(tmp_path / "name", *options))
    assert wandb._options == {"project": "d2kit", "name": "name", "entity": None}
    assert (wandb._mode, mlflow._experiment, mlflow._name) == ("offline", "e", "name")
    assert wandb._config["SOLVER"]["BASE_LR"] == 0.1
    with pytest.raises(ValueError, match="expected online or offline"):
        build_tracker_writers(tiny.tiny_cfg(tmp_path, *BOTH, "WRITERS.WANDB.MODE", "on"))


def test_a_resumed_run_goes_on_and_ends_equal(tmp_path, images):
    """The writers' keys may change on resume; the run of the service is the same one."""
    tiny.TinyTrainer(tiny.tiny_cfg(tmp_path / "straight")).train()
    first = Trainer(tiny.tiny_cfg(tmp_path / "run", "SOLVER.MAX_ITER", 6))
    first.train()
    again = Trainer(tiny.tiny_cfg(tmp_path / "run", "WRITERS.MLFLOW.NAME", "other"))
    again.resume_or_load()
    assert again.start_iter == 6
    again.train()
    assert [step for step, _ in first.memory.rows + again.memory.rows] == [5, 11]
    assert first.memory._run_id == again.memory._run_id == "run"
    assert again.memory.failed is False
    assert tiny.final_state(tmp_path / "run") == tiny.final_state(tmp_path / "straight")
