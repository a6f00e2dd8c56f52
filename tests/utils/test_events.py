import json
import logging

import numpy as np
import pytest
import torch

from d2kit.utils import events as _event_storage
from d2kit.utils.events import (
    CommonMetricPrinter,
    EventStorage,
    EventWriter,
    JSONWriter,
    TensorboardXWriter,
    get_event_storage,
    has_event_storage,
)


def test_the_innermost_storage_is_current():
    assert not has_event_storage()
    with pytest.raises(RuntimeError, match="EventStorage"):
        get_event_storage()
    with EventStorage(3) as outer:
        assert get_event_storage() is outer
        assert (outer.iter, outer.iteration) == (3, 3)
        with EventStorage() as inner:
            assert get_event_storage() is inner
        assert get_event_storage() is outer
    assert not has_event_storage()


def test_scalars():
    storage = EventStorage(10)
    storage.put_scalar("lr", 0.1, smoothing_hint=False)
    storage.put_scalars(a=torch.tensor([1.5], requires_grad=True), b=np.float32(2))
    storage.step()
    storage.put_scalar("a", 4)
    storage.put_scalar("late", 7, cur_iter=3)
    assert storage.latest() == {"lr": (0.1, 10), "a": (4.0, 11), "b": (2.0, 10), "late": (7.0, 3)}
    assert storage.history("a").values() == [(1.5, 10), (4.0, 11)]
    assert storage.histories()["a"].latest() == 4.0
    assert storage.smoothing_hints() == {"lr": False, "a": True, "b": True, "late": True}
    assert storage.latest_with_smoothing_hint()["a"] == (2.75, 11)
    assert storage.latest_with_smoothing_hint(1)["a"] == (4.0, 11)
    storage.iter = 20
    assert storage.iter == 20


def test_mistakes():
    storage = EventStorage()
    storage.put_scalar("loss", 1)
    with pytest.raises(ValueError, match="smoothing_hint"):
        storage.put_scalar("loss", 1, smoothing_hint=False)
    with pytest.raises(ValueError, match="one element"):
        storage.put_scalar("vector", torch.zeros(2))
    with pytest.raises(KeyError, match=r"lss.*loss"):
        storage.history("lss")


def test_smoothing_counts_iterations_not_values():
    storage = EventStorage()
    for value in range(10):
        storage.iter = value * 10
        storage.put_scalar("x", value)
    assert storage.count_samples("x", 20) == 2
    assert storage.count_samples("x", 1000) == 10
    assert storage.count_samples("x", 1) == 1
    assert storage.latest_with_smoothing_hint(30)["x"] == (8.0, 90)


def test_name_scope():
    storage = EventStorage()
    with storage.name_scope("rpn"):
        storage.put_scalar("loss", 1)
        with storage.name_scope("cls/"):
            storage.put_scalar("loss", 2)
    storage.put_scalar("loss", 3)
    assert set(storage.latest()) == {"rpn/loss", "cls/loss", "loss"}


def test_device_scalars_wait_until_they_are_read(monkeypatch):
    """Tensors that are not on the CPU are kept; reading fetches all of them in one copy."""
    monkeypatch.setattr(_event_storage, "_on_device", lambda tensor: True)
    storage = EventStorage()
    total = torch.tensor(1.0)
    storage.put_scalar("loss", total)
    total += 1  # what was put must not change
    storage.put_scalar("lr", 0.5)
    storage.step()
    storage.put_scalar("loss", total)
    assert len(storage._pending) == 3
    assert storage.history("loss").values() == [(1.0, 0), (2.0, 1)]
    assert storage._pending == []
    assert storage.latest() == {"loss": (2.0, 1), "lr": (0.5, 0)}
    monkeypatch.setattr(_event_storage, "_MAX_PENDING", 2)
    for _ in range(3):
        storage.put_scalar("loss", total)
    assert storage._pending == []


def test_images_and_histograms():
    storage = EventStorage(5)
    storage.put_image("picture", torch.zeros(3, 2, 2))
    storage.put_histogram("weights", torch.tensor([0.0, 1.0, 1.0, 4.0]), bins=4)
    assert [(name, step) for name, _, step in storage._vis_data] == [("picture", 5)]
    histogram = storage._histograms[0]
    assert histogram["bucket_counts"] == [1.0, 2.0, 0.0, 1.0]
    assert histogram["bucket_limits"] == [1.0, 2.0, 3.0, 4.0]
    assert (histogram["min"], histogram["max"], histogram["num"]) == (0.0, 4.0, 4)
    assert (histogram["sum"], histogram["sum_squares"]) == (6.0, 18.0)
    storage.clear_images()
    storage.clear_histograms()
    assert not storage._vis_data
    assert not storage._histograms


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_json_lines_carry_the_iteration_of_the_value(tmp_path):
    file = tmp_path / "metrics.json"
    with EventStorage(0) as storage:
        writer = JSONWriter(str(file), window_size=2)
        for i in range(6):
            storage.put_scalar("loss", float(i))
            if i == 3:
                storage.put_scalar("AP", 50.0, smoothing_hint=False)
            if i % 2:
                writer.write()
            storage.step()
        storage.put_scalar("late", 1, cur_iter=4)
        writer.write()
        writer.close()
    assert lines(file) == [
        {"iteration": 1, "loss": 0.5},
        {"iteration": 3, "loss": 2.5, "AP": 50.0},
        {"iteration": 5, "loss": 4.5},
    ]


def test_json_has_null_for_what_is_not_finite(tmp_path):
    file = tmp_path / "metrics.json"
    with EventStorage(3) as storage:
        writer = JSONWriter(str(file))
        storage.put_scalars(AP=float("nan"), loss=float("inf"), lr=0.5, smoothing_hint=False)
        writer.write()
        writer.close()
    assert lines(file) == [{"iteration": 3, "AP": None, "loss": None, "lr": 0.5}]


def test_json_is_continued_and_a_torn_line_is_cut_off(tmp_path):
    file = tmp_path / "metrics.json"
    file.write_text('{"iteration": 0, "loss": 1.0}\n{"iteration": 1, "lo')
    with EventStorage(1) as storage:
        writer = JSONWriter(str(file))
        storage.put_scalar("loss", 2.0)
        writer.write()
        writer.write()
        writer.close()
    assert lines(file) == [{"iteration": 0, "loss": 1.0}, {"iteration": 1, "loss": 2.0}]


@pytest.mark.parametrize("written", [True, False])  # before the checkpoint
def test_a_resumed_run_writes_each_value_once(tmp_path, written):
    file = tmp_path / "metrics.json"
    with EventStorage(0) as storage:
        writer = JSONWriter(str(file))
        storage.put_scalars(loss=1.0, AP=50.0, smoothing_hint=False)
        storage.put_scalar("time", 0.1)
        if written:
            writer.write()
        state = storage.state_dict()
        storage.step()
        storage.put_scalar("loss", 3.0, smoothing_hint=False)
        writer.write()  # of an iteration after the checkpoint, which comes again
        writer.close()
    expected = lines(file)
    assert [(row["iteration"], row.get("AP")) for row in expected] == [(0, 50.0), (1, None)]
    if not written:
        file.write_text("")
    with EventStorage(1) as storage:
        storage.load_state_dict(state)
        writer = JSONWriter(str(file))
        writer.continue_from(1)
        storage.put_scalar("loss", 3.0, smoothing_hint=False)
        writer.write()
        writer.close()
        assert "time" not in storage.histories()
    assert [row | {"time": 0} for row in lines(file)] == [row | {"time": 0} for row in expected]


def test_the_state_covers_iterations_not_values():
    storage = EventStorage()
    for iteration in range(8):
        storage.iter = iteration
        for value in (1.0, 9.0, 5.0):  # parts of an accumulated batch
            storage.put_scalar("accuracy", iteration + value)
    other = EventStorage()
    other.load_state_dict(storage.state_dict(window=4))
    assert len(other.history("accuracy").values()) == 12
    assert other.history("accuracy").values() == storage.history("accuracy").values()[-12:]


def test_printer(caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    printer = CommonMetricPrinter(max_iter=100)
    with EventStorage(8) as storage:
        storage.put_scalars(total_loss=1.23456, time=2.0, data_time=0.5)
        storage.put_scalar("lr", 0.02, smoothing_hint=False)
        storage.step()
        storage.put_scalars(total_loss=3.0, time=4.0, data_time=0.5, other=3)
        printer.write()
        assert storage.latest()["eta_seconds"] == (90 * 3.0, 9)
        storage.iter = 100
        printer.write()
    (record,) = caplog.records
    assert record.message == (
        "eta: 0:04:30  iter: 9  total_loss: 2.117  time: 3.0000  last_time: 4.0000  "
        "data_time: 0.5000  last_data_time: 0.5000  lr: 0.02"
    )
    assert record.name.startswith("d2kit.")


def test_printer_measures_time_itself(caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    times = iter([0.0, 20.0])
    monkeypatch.setattr("d2kit.utils.events.time.perf_counter", lambda: next(times))
    printer = CommonMetricPrinter(max_iter=111)
    with EventStorage(0) as storage:
        printer.write()
        storage.iter = 10
        printer.write()
    first, second = (record.message for record in caplog.records)
    assert first.startswith("iter: 0")
    assert second.startswith("eta: 0:03:20  iter: 10")


def test_tensorboard(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with EventStorage(4) as storage:
        storage.put_scalar("loss", 2.0)
        storage.put_image("picture", torch.zeros(3, 4, 4, dtype=torch.uint8))
        storage.put_histogram("weights", torch.arange(4.0), bins=2)
        writer = TensorboardXWriter(str(tmp_path))
        writer.write()
        assert not storage._vis_data
        storage.step()
        storage.put_scalar("loss", 4.0)
        writer.write()
        writer.close()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(4, 2.0), (5, 3.0)]
    assert events.Tags()["images"] == ["picture"]
    assert events.Tags()["histograms"] == ["weights"]


def test_unused_tensorboard_writer_makes_no_file(tmp_path):
    TensorboardXWriter(str(tmp_path / "x")).close()
    assert not (tmp_path / "x").exists()


def test_writers_are_abstract():
    with pytest.raises(TypeError):
        EventWriter()
