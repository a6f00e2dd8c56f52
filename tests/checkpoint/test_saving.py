import logging
import os
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from d2kit.checkpoint import Checkpointer, DetectionCheckpointer, PeriodicCheckpointer
from d2kit.checkpoint.files import read_checkpoint, set_aside
from d2kit.engine import hooks


class Counter:
    """A checkpointable with a state of our choice."""

    def __init__(self, state=None):
        self.state = {} if state is None else state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def make(folder, **checkpointables):
    torch.manual_seed(0)
    return DetectionCheckpointer(nn.Linear(8, 8), folder, **checkpointables)


def save_three(folder):
    """Checkpoints of iterations 9, 19, 29; the weights are filled with the iteration."""
    checkpointer = make(folder)
    for iteration in (9, 19, 29):
        with torch.no_grad():
            checkpointer.model.weight.fill_(iteration)
        checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
    return checkpointer


def resumed_iteration(folder):
    """What a fresh process resumes from, read from the weights; None for nothing."""
    checkpointer = make(folder)
    extra = checkpointer.resume_or_load("", resume=True)
    if not checkpointer.resumed_from:
        return None
    assert extra["iteration"] == checkpointer.model.weight[0, 0].item()
    return extra["iteration"]


def test_round_trip_is_exact_and_readable_by_torch(tmp_path):
    optimizer_state = {"step": 3, "momentum": torch.randn(4), "lrs": [0.1, 0.2], "name": "sgd"}
    checkpointer = make(tmp_path, trainer=Counter(optimizer_state))
    checkpointer.save("model_x", iteration=5, note="hello")
    raw = torch.load(tmp_path / "model_x.pth", weights_only=True)
    assert set(raw) == {"model", "trainer", "iteration", "note", "run", "run_started"}
    other = make(tmp_path, trainer=Counter())
    nn.init.zeros_(other.model.weight)
    extra = other.load(str(tmp_path / "model_x.pth"))
    assert extra == {"iteration": 5, "note": "hello"}
    assert torch.equal(other.model.weight, checkpointer.model.weight)
    assert torch.equal(
        other.checkpointables["trainer"].state["momentum"], optimizer_state["momentum"]
    )
    assert (tmp_path / "last_checkpoint").read_text() == "model_x.pth"
    assert isinstance(checkpointer, Checkpointer)


def test_loading_without_resuming_leaves_the_state_alone(tmp_path):
    make(tmp_path, trainer=Counter({"a": 1})).save("m")
    fresh = make(tmp_path, trainer=Counter())
    extra = fresh.resume_or_load(str(tmp_path / "m.pth"), resume=False)
    assert fresh.checkpointables["trainer"].state == {}
    assert extra["trainer"] == {"a": 1}
    assert fresh.resumed_from == ""


def test_numpy_values_become_plain_and_other_objects_are_refused(tmp_path):
    state = {"best": np.float64(0.5), "history": np.arange(3), "t": (1, [np.int64(2)])}
    make(tmp_path, hook=Counter(state)).save("m")
    loaded = torch.load(tmp_path / "m.pth", weights_only=True)["hook"]
    assert loaded["best"] == 0.5
    assert loaded["history"].tolist() == [0, 1, 2]
    assert loaded["t"] == (1, [2])
    with pytest.raises(TypeError, match=r"hook\.a\[0\] is a PosixPath"):
        make(tmp_path, hook=Counter({"a": [tmp_path]})).save("n")
    assert not (tmp_path / "n.pth").exists()


def test_nothing_is_written_where_it_should_not(tmp_path):
    make(tmp_path, save_to_disk=False).save("m")
    make("").save("m")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="plain file name"):
        make(tmp_path).save("../m")


def test_a_failing_save_leaves_the_old_file(tmp_path, monkeypatch):
    checkpointer = make(tmp_path)
    checkpointer.save("m", iteration=1)
    before = (tmp_path / "m.pth").read_bytes()

    def fail(data, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpointer.save("m", iteration=2)
    assert (tmp_path / "m.pth").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last_checkpoint", "m.pth"]


def test_the_highest_iteration_is_resumed(tmp_path):
    save_three(tmp_path)
    assert resumed_iteration(tmp_path) == 29
    os.utime(tmp_path / "model_0000009.pth", (2e9, 2e9))  # a younger file of an older iteration
    assert resumed_iteration(tmp_path) == 29


@pytest.mark.faults(12, fast=True)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_checkpoint_is_named_and_passed_over(tmp_path, share, caplog):
    save_three(tmp_path)
    path = tmp_path / "model_0000029.pth"
    os.truncate(path, int(path.stat().st_size * share))
    with caplog.at_level(logging.WARNING):
        assert resumed_iteration(tmp_path) == 19
    assert "model_0000029.pth" in caplog.text


@pytest.mark.faults(12, fast=True)
def test_a_flipped_bit_is_noticed(tmp_path, caplog):
    save_three(tmp_path)
    path = tmp_path / "model_0000029.pth"
    content = bytearray(path.read_bytes())
    place = content.index(np.float32(29).tobytes() * 4)
    content[place] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)  # torch itself does not notice
    with caplog.at_level(logging.WARNING):
        assert resumed_iteration(tmp_path) == 19
    assert "checksum" in caplog.text


@pytest.mark.faults(13, fast=True)
@pytest.mark.parametrize("content", [None, b"", b"\x00\xff\x80", b"../evil.pth", b"model_x.pth"])
def test_the_pointer_file_is_never_believed(tmp_path, content):
    folder = tmp_path / "run"
    save_three(folder)
    shutil.copy(folder / "model_0000009.pth", tmp_path / "evil.pth")
    pointer = folder / "last_checkpoint"
    pointer.unlink() if content is None else pointer.write_bytes(content)
    assert resumed_iteration(folder) == 29


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_a_pipe_is_no_checkpoint(tmp_path):
    """Opening it would wait for somebody who writes."""
    save_three(tmp_path)
    os.mkfifo(tmp_path / "model_0000039.pth")
    assert resumed_iteration(tmp_path) == 29
    with pytest.raises(ValueError, match="pipe"):
        read_checkpoint(tmp_path / "model_0000039.pth")


def test_results_of_an_earlier_training_are_set_aside(tmp_path):
    checkpointer = save_three(tmp_path)
    checkpointer.save("model_best", iteration=19)
    checkpointer.save("model_final", iteration=29)
    checkpointer.save("model_best_ema.safetensors")
    best = (tmp_path / "model_best.pth").read_bytes()
    names = [path.name for path in set_aside(tmp_path, str(tmp_path / "model_final.pth"))]
    assert names == ["model_best_of_run1.pth", "model_best_ema_of_run1.safetensors"]
    assert (tmp_path / names[0]).read_bytes() == best
    assert (tmp_path / "model_final.pth").exists()  # the training starts from it
    shutil.copy(tmp_path / names[0], tmp_path / "model_best.pth")
    assert [path.name for path in set_aside(tmp_path)][0] == "model_best_of_run1_2.pth"
    assert resumed_iteration(tmp_path) == 29


def test_nothing_to_resume(tmp_path):
    assert resumed_iteration(tmp_path / "absent") is None
    (tmp_path / "noise.pth").write_bytes(b"no checkpoint")
    assert resumed_iteration(tmp_path) is None
    assert not make(tmp_path).has_checkpoint()
    assert make(tmp_path).get_all_checkpoint_files() == [str(tmp_path / "noise.pth")]


def test_a_file_is_verified_once(tmp_path, monkeypatch):
    checkpointer = save_three(tmp_path)
    monkeypatch.setattr("d2kit.checkpoint.files.damage", lambda path: pytest.fail("verified"))
    assert checkpointer.get_checkpoint_file().endswith("model_0000029.pth")


def test_data_parallel_models_are_unwrapped(tmp_path):
    wrapped = nn.DataParallel(nn.Linear(2, 2))
    DetectionCheckpointer(wrapped, tmp_path).save("m")
    assert set(torch.load(tmp_path / "m.pth", weights_only=True)["model"]) == {"weight", "bias"}
    torch.save({"model": wrapped.state_dict()}, tmp_path / "prefixed.pth")
    target = nn.Linear(2, 2)
    DetectionCheckpointer(target).load(str(tmp_path / "prefixed.pth"))
    assert torch.equal(target.weight, wrapped.module.weight)


def test_safetensors_out_and_in(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight  # shared memory is written twice
    DetectionCheckpointer(model, tmp_path).save("weights.safetensors")
    target = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    DetectionCheckpointer(target).load(str(tmp_path / "weights.safetensors"))
    for name, value in model.state_dict().items():
        assert torch.equal(target.state_dict()[name], value)
    assert not (tmp_path / "last_checkpoint").exists()


@pytest.mark.parametrize("kind", [PeriodicCheckpointer, hooks.PeriodicCheckpointer])
def test_periodic_files(tmp_path, kind):
    periodic = kind(make(tmp_path), period=2, max_iter=7, max_to_keep=2)
    for iteration in range(7):
        periodic.step(iteration)
    names = sorted(path.stem for path in tmp_path.glob("*.pth"))
    assert names == ["model_0000003", "model_0000005", "model_final"]


def test_periodic_hook_counts_files_of_earlier_runs(tmp_path):
    for start in (0, 4):
        periodic = hooks.PeriodicCheckpointer(make(tmp_path), 1, max_to_keep=3)
        for iteration in range(start, start + 4):
            periodic.step(iteration)
    names = sorted(path.stem for path in tmp_path.glob("*.pth"))
    assert names == ["model_0000005", "model_0000006", "model_0000007"]


def test_a_later_training_in_the_same_folder_is_newer_though_shorter(tmp_path):
    for last in (30, 6, 9):  # the third goes on with the second
        checkpointer = make(tmp_path)
        if last == 9:
            assert checkpointer.resume_or_load("", resume=True) == {"iteration": 5}
        periodic = hooks.PeriodicCheckpointer(checkpointer, 1, max_to_keep=2)
        for iteration in range(0 if last != 9 else 6, last):
            with torch.no_grad():
                checkpointer.model.weight.fill_(iteration)
            periodic.step(iteration)
        assert resumed_iteration(tmp_path) == last - 1
    names = sorted(path.stem for path in tmp_path.glob("*.pth"))
    assert names == ["model_0000007", "model_0000008"]


def test_of_a_training_that_does_not_say_when_it_began_the_longest_counts(tmp_path):
    for iteration in (9, 4):  # as files of Detectron2
        torch.save(
            {"model": make(tmp_path).model.state_dict(), "iteration": iteration},
            tmp_path / f"model_{iteration:07d}.pth",
        )
    checkpointer = make(tmp_path)
    assert checkpointer.resume_or_load("", resume=True) == {"iteration": 9}
    checkpointer.save("model_0000011", iteration=11)
    again = make(tmp_path)
    assert again.resume_or_load("", resume=True) == {"iteration": 11}
