import json
import os
import subprocess
import sys

import pytest
import torch

from d2kit.engine import launch
from d2kit.engine.launch import (
    Place,
    _choose_gpu,
    _find_free_port,
    _hidden_gpus,
    find_place,
    first_host,
)
from tests.support import distributed
from tests.support import tiny_run as tiny


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    tiny.register(tmp_path / "images")
    tiny.records(tmp_path / "images")
    return tmp_path


def check_two_ranks(folder):
    """Both ranks trained like one process, and stopped together at the poisoned image."""
    facts = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert [fact["world"] for fact in facts] == [2, 2]
    assert [fact["local_rank"] for fact in facts] == [0, 1]
    assert facts[0]["threads"] == max(1, len(os.sched_getaffinity(0)) // 2)
    alone = distributed.train(folder / "images", folder / "one")
    assert facts[0]["losses"] == pytest.approx(alone, rel=1e-5)
    assert facts[0]["error"] == facts[1]["error"]
    assert "loss_box=nan" in facts[0]["error"]
    assert "rank 1, images [" in facts[0]["error"]
    one, two = (
        torch.load(folder / name / "model_final.pth", weights_only=True)["model"]
        for name in ("one", "two")
    )
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)


def test_two_processes_train_like_one_and_fail_together(folder):
    with pytest.raises(torch.multiprocessing.ProcessRaisedException) as error:
        launch(distributed.main, 0, args=(str(folder), True), num_processes=2)
    assert "rank 1 fails on purpose" in str(error.value)
    check_two_ranks(folder)


@pytest.mark.slow
def test_torchrun_joins_without_spawning(folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(_find_free_port()), "-m", "tests.support.distributed"]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(folder)], capture_output=True, text=True, timeout=300, env=env, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    check_two_ranks(folder)


@pytest.mark.slow
def test_exit_codes_of_children_are_passed_on():
    with pytest.raises(SystemExit) as error:
        launch(distributed.leave, 0, args=(3,), num_processes=2)
    assert error.value.code == 3


def test_one_process_is_this_one():
    seen = []
    launch(seen.append, 0, args=(1,))
    launch(seen.append, 1, args=(2,), num_processes=1)
    assert seen == [1, 2]


def test_torchrun_with_one_process_needs_no_group(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "1234")
    threads, seen = torch.get_num_threads(), []
    try:
        launch(seen.append, 8, args=(1,))
    finally:
        torch.set_num_threads(threads)
    assert seen == [1]
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_gpus_per_machine": 99}, "--num-processes 99"),
        ({"num_gpus_per_machine": 1, "machine_rank": 2}, r"machine_rank must be in \[0, 1\)"),
        ({"num_gpus_per_machine": 1, "num_machines": 2}, "need --dist-url"),
    ],
)
def test_impossible_numbers_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        launch(print, **kwargs)


TORCHRUN = {
    **{"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
    **{"MASTER_ADDR": "host", "MASTER_PORT": "29500"},
}
SLURM = {
    **{"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8"},
    **{"SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_STEP_NODELIST": "gpu[07-08]"},
    **{"SLURM_JOB_ID": "123"},
}


def test_torchrun_and_slurm_are_read():
    assert find_place(TORCHRUN) == Place(5, 8, 1, 4, "host", 29500, "torchrun")
    assert find_place(SLURM) == Place(5, 8, 1, 4, "gpu07", 20123, "SLURM")
    set_by_user = {**SLURM, "MASTER_ADDR": "login", "MASTER_PORT": "77"}
    assert find_place(set_by_user) == Place(5, 8, 1, 4, "login", 77, "SLURM")
    assert find_place({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}) is None
    assert find_place({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) is None  # a batch script
    assert find_place({}) is None


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({k: v for k, v in TORCHRUN.items() if k != "LOCAL_RANK"}, "lacks LOCAL_RANK"),
        ({k: v for k, v in SLURM.items() if k != "SLURM_LOCALID"}, "lacks SLURM_LOCALID"),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "4(x2),3"}, "same number"),
    ],
)
def test_incomplete_environments_are_named(env, message):
    with pytest.raises(ValueError, match=message):
        find_place(env)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node1", "node1"),
        ("a1,a2", "a1"),
        ("gpu[007-009,12],login", "gpu007"),
        ("rack3-[1,4]-ib", "rack3-1-ib"),
        ("c[2-3]", "c2"),
        ("r[1-2]n[03,07],r4n1", "r1n03"),
        ("gpu-1.cluster.example", "gpu-1.cluster.example"),
    ],
)
def test_first_host_of_a_node_list(nodes, host):
    assert first_host(nodes) == host


@pytest.mark.parametrize("nodes", ["", "gpu[", "gpu[1-2", ",a", "a b"])
def test_unreadable_node_lists_are_refused(nodes):
    with pytest.raises(ValueError, match="cannot read the SLURM node list"):
        first_host(nodes)


@pytest.mark.parametrize("name", ["SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST"])
def test_node_list_is_found_under_each_of_its_names(name):
    env = {key: value for key, value in SLURM.items() if key != "SLURM_STEP_NODELIST"}
    assert find_place({**env, name: "a[3-4]"}).address == "a3"
    with pytest.raises(ValueError, match="lacks SLURM_JOB_NODELIST"):
        find_place(env)


@pytest.mark.parametrize(
    ("source", "gpus", "message"),
    [
        ("torchrun", 1, "2 processes, 1 CUDA devices"),  # NCCL's own words: duplicate GPU detected
        ("SLURM", 1, None),  # each task may see only its own
        ("torchrun", 2, None),
        ("SLURM", 2, None),
    ],
)
def test_more_processes_than_gpus_are_refused_before_nccl(monkeypatch, source, gpus, message):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    place = Place(1, 2, 1, 2, "", 0, source)
    if message is None:
        _choose_gpu(place, gpus)
        assert chosen == [gpus - 1]
    else:
        with pytest.raises(ValueError, match=message):
            _choose_gpu(place, gpus)


def test_processes_on_the_cpu_see_no_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with _hidden_gpus():
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with _hidden_gpus():
        pass
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
