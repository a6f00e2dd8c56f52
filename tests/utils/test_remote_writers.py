"""Writers to tracking services: the rules with a service in memory, then the real packages."""

import functools
import json
import logging
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from d2kit.utils import remote_writers as _remote_writers
from d2kit.utils.events import EventStorage
from d2kit.utils.remote_writers import RemoteWriter, require_package


class Service(RemoteWriter):
    """Keeps what it is sent; as slow or broken as a test asks."""

    service = "memory"

    def __init__(self, folder, broken=(), gate=None):
        super().__init__(folder)
        self.rows, self.broken, self.gate = [], set(broken), gate

    def _start(self, run_id):
        self._fail("start")
        self.rows.append(("start", run_id))
        return run_id or "new"

    def _send(self, step, scalars, pictures):
        if self.gate is not None:
            self.gate.wait(10)
        self._fail("send")
        self.rows.append((step, scalars, [(name, pixels.shape) for name, pixels, _ in pictures]))

    def _finish(self, failed):
        self.rows.append(("finish", failed))

    def _fail(self, what):
        if what in self.broken:
            raise ConnectionError("no route")


def train(writer, start, stop, period=5):
    """Put a scalar in each iteration and a picture in each fifth; write as a trainer does."""
    writer.continue_from(start)
    with EventStorage(start) as storage:
        for i in range(start, stop):
            storage.iter = i
            storage.put_scalar("x", i, smoothing_hint=False)
            if i % 5 == 4:
                storage.put_image("vis", torch.zeros(3, 4, 6, dtype=torch.uint8))
                writer.write()
                storage.clear_images()


def test_scalars_and_pictures_by_iteration(tmp_path):
    writer = Service(tmp_path)
    train(writer, 0, 10)
    writer.close()
    picture = [("vis", (4, 6, 3))]
    assert writer.rows == [
        ("start", None),
        (4, {"x": 4.0}, picture),
        (9, {"x": 9.0}, picture),
        ("finish", False),
    ]
    assert json.loads((tmp_path / "memory_run.json").read_text()) == {"run": "new", "last": 9}


def test_a_resumed_run_continues_without_a_step_twice(tmp_path):
    first = Service(tmp_path)
    train(first, 0, 13)  # killed here; the checkpoint is of iteration 5
    first.close()
    again = Service(tmp_path)
    train(again, 5, 20)
    again.close()
    assert again.rows[0] == ("start", "new")
    assert [row[0] for row in again.rows[1:-1]] == [14, 19]


def test_a_new_training_in_the_folder_is_a_new_run(tmp_path):
    for _ in range(2):
        writer = Service(tmp_path)
        train(writer, 0, 5)
        writer.close()
        assert [row[0] for row in writer.rows] == ["start", 4, "finish"]
        assert writer.rows[0] == ("start", None)


def test_an_exception_marks_the_run(tmp_path):
    writer = Service(tmp_path)
    with pytest.raises(ZeroDivisionError):  # noqa: PT012 - as `TrainerBase.train` closes
        try:
            train(writer, 0, 5)
            1 / 0  # noqa: B018
        finally:
            writer.close()
    assert writer.rows[-1] == ("finish", True)


@pytest.mark.parametrize("broken", ["start", "send"])
def test_a_broken_service_is_named_once(tmp_path, broken, caplog):
    writer = Service(tmp_path, broken=[broken])
    with caplog.at_level(logging.WARNING):
        train(writer, 0, 20)
        writer.close()
    assert caplog.text.count("memory: ConnectionError: no route") == 1
    assert "The training goes on" in caplog.text
    assert not [row for row in writer.rows if isinstance(row[0], int)]


def test_a_service_that_comes_back_gets_what_comes_then(tmp_path):
    writer = Service(tmp_path, broken=["start"])
    train(writer, 0, 5)
    while not writer._jobs.empty():
        time.sleep(0.01)
    writer.broken.clear()
    with EventStorage(9) as storage:
        storage.put_scalar("x", 9.0)
        writer.write()
    writer.close()
    assert [row[0] for row in writer.rows] == ["start", 9, "finish"]


def test_a_stuck_service_never_blocks(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(_remote_writers, "WAITING", 3)
    monkeypatch.setattr(_remote_writers, "CLOSE_SECONDS", 0.2)
    gate = threading.Event()
    writer = Service(tmp_path, gate=gate)
    start = time.perf_counter()
    with caplog.at_level(logging.WARNING):
        train(writer, 0, 100)
        thread = writer._thread
        writer.close()
    assert time.perf_counter() - start < 5
    assert "does not take the values as fast" in caplog.text
    assert "not everything was sent in time" in caplog.text
    gate.set()
    writer._jobs.put(None)
    thread.join(5)
    assert not thread.is_alive()


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_a_damaged_note_begins_a_new_run(tmp_path, content):
    (tmp_path / "memory_run.json").write_text(content)
    writer = Service(tmp_path)
    train(writer, 5, 10)
    writer.close()
    assert writer.rows[0] == ("start", None)


def test_floating_point_pictures():
    found = _remote_writers._to_rgb(np.array([0.0, 0.5, 1.2]).reshape(3, 1, 1))
    assert found.tolist() == [[[0, 128, 255]]]
    assert found.dtype == np.uint8


def test_missing_package_is_named():
    with pytest.raises(ValueError, match=r"pip install d2kit\[no_such\], or set A\.B False"):
        require_package("no_such", "A.B")
    require_package("json", "A.B")


# ---- real packages


def wandb_rows(folder, count):
    """Return run ids and history of a folder's offline runs; wandb writes them a little later."""
    for _ in range(300):
        found = read_wandb(folder)
        if len(found[1]) >= count:
            break
        time.sleep(0.1)
    return found


def read_wandb(folder):
    from wandb.proto.wandb_internal_pb2 import Record

    rows, ids = [], set()
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        data, at, parts = path.read_bytes(), 7, b""
        while at + 7 <= len(data):  # LevelDB's log format: blocks of 32 KiB
            if 32768 - at % 32768 < 7:
                at += 32768 - at % 32768
            size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
            parts += data[at + 7 : at + 7 + size]
            at += 7 + size
            if kind in (1, 4):
                record, parts = Record.FromString(parts), b""
                if record.HasField("run"):
                    ids.add(record.run.run_id)
                if record.HasField("history"):
                    items = {
                        i.key or "/".join(i.nested_key): json.loads(i.value_json)
                        for i in record.history.item
                    }
                    rows.append(items)
    return ids, rows


@pytest.mark.slow
def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setattr(_remote_writers, "CLOSE_SECONDS", 120)
    make = functools.partial(_remote_writers.WandbWriter, tmp_path, project="p", mode="offline")
    first = make(config={"SOLVER": {"BASE_LR": 0.1}})
    train(first, 0, 13)
    first.close()
    time.sleep(1.1)  # the folders of wandb are named by the second
    again = make(config={"SOLVER": {"BASE_LR": 0.1}})
    train(again, 5, 20)
    again.close()
    ids, rows = wandb_rows(tmp_path, 4)
    assert len(ids) == 1
    assert ids == {json.loads((tmp_path / "wandb_run.json").read_text())["run"]}
    assert [(row["_step"], row["x"]) for row in rows] == [(4, 4), (9, 9), (14, 14), (19, 19)]
    assert all(row["vis/_type"] == "image-file" for row in rows)
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/*.png"))) == 4


UNREACHABLE = """
import logging, sys, time
from d2kit.utils import _remote_writers as module
from tests.utils.test_remote_writers import train
logging.basicConfig(level=logging.WARNING, format="%(name)s %(message)s")
module.START_SECONDS, module.CLOSE_SECONDS = 5, 120
start = time.perf_counter()
writer = module.WandbWriter(sys.argv[1], project="p")
train(writer, 0, 10)
print("trained in", time.perf_counter() - start)
writer.close()
"""


@pytest.mark.slow
def test_wandb_without_a_network_is_kept_for_later(tmp_path):
    """In a process of its own: wandb reads its address once in a process."""
    pytest.importorskip("wandb")
    nowhere = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}
    own = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    done = subprocess.run(
        [sys.executable, "-c", UNREACHABLE, str(tmp_path)],
        env={**own, **nowhere},
        capture_output=True,
        text=True,
        timeout=150,
        check=True,
    )
    assert float(done.stdout.split()[-1]) < 2, "the training waited"
    assert done.stderr.count("d2kit.utils.remote_writers") == 1
    assert "connection refused" in done.stderr
    assert "wandb sync" in done.stderr
    assert [row["_step"] for row in wandb_rows(tmp_path, 2)[1]] == [4, 9]


@pytest.mark.slow
@pytest.mark.parametrize("store", ["file", "sqlite"])
def test_mlflow_local(tmp_path, store, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.chdir(tmp_path)  # where a local store keeps artifacts
    from mlflow.tracking import MlflowClient

    uri = f"file://{tmp_path}/runs"
    if store == "sqlite":
        pytest.importorskip("sqlalchemy")
        uri = f"sqlite:///{tmp_path}/ml.db"
    make = functools.partial(
        _remote_writers.MLflowWriter, tmp_path, tracking_uri=uri, experiment="e"
    )
    monkeypatch.setattr(_remote_writers, "CLOSE_SECONDS", 120)
    first = make(config={"SOLVER": {"BASE_LR": 0.1}, "A": list(range(500))})
    train(first, 0, 13)
    first.close()
    again = make(config={"SOLVER": {"BASE_LR": 0.2}})
    train(again, 5, 20)
    again.close()
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("e")
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 1
    run = runs[0]
    assert run.info.status == "FINISHED"
    assert run.info.run_id == json.loads((tmp_path / "mlflow_run.json").read_text())["run"]
    assert run.info.run_name == tmp_path.name
    assert run.data.params["SOLVER.BASE_LR"] == "0.1"
    history = client.get_metric_history(run.info.run_id, "x")
    assert sorted((m.step, m.value) for m in history) == [(4, 4), (9, 9), (14, 14), (19, 19)]
    assert len(client.list_artifacts(run.info.run_id, "vis")) == 4


@pytest.mark.slow
def test_mlflow_without_a_server(tmp_path, monkeypatch, caplog):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    writer = _remote_writers.MLflowWriter(tmp_path, tracking_uri="http://127.0.0.1:9")
    with caplog.at_level(logging.WARNING, logger="d2kit"):
        train(writer, 0, 10)
        writer.close()
    assert caplog.text.count("mlflow: MlflowException") == 1
