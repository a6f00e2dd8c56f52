import json
import os
import subprocess
import sys

import pytest
import torch

from d2kit.utils import comm


def test_world_of_one():
    assert comm.get_world_size() == 1
    assert comm.get_rank() == 0
    assert comm.get_local_rank() == 0
    assert comm.get_local_size() == 1
    assert comm.is_main_process()
    comm.synchronize()
    data = {"a": object()}
    assert comm.gather(data) == [data]
    assert comm.all_gather(data) == [data]
    assert 0 <= comm.shared_random_seed() < 2**31
    assert comm.reduce_dict({"a": torch.tensor(2.0)}) == {"a": torch.tensor(2.0)}
    with pytest.raises(RuntimeError, match="create_local_process_group"):
        comm.get_local_process_group()
    with pytest.raises(ValueError, match="multiple"):
        comm.create_local_process_group(2)


def test_mean_over_one_rank():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    mean = comm.mean_over_ranks(x)
    assert mean.tolist() == [1.0, 2.0]
    assert not mean.requires_grad
    assert comm.mean_over_ranks(torch.tensor(3)).dtype == torch.float32


WORKER = """
import json, sys
import numpy as np, torch, torch.distributed as dist
from d2kit.utils import comm
rank, file = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
np.random.seed(rank)
x = torch.tensor(float(rank + 1), requires_grad=True)
result = {
    "rank": comm.get_rank(), "world": comm.get_world_size(), "main": comm.is_main_process(),
    "all": comm.all_gather({"r": rank}), "at0": comm.gather(rank), "at1": comm.gather(rank, dst=1),
    "seed": comm.shared_random_seed(),
    "sum": float(comm.reduce_dict({"b": x, "a": 2 * x}, average=False)["a"]),
    "mean": {k: float(v) for k, v in comm.reduce_dict({"b": x, "a": 2 * x}).items()},
    "over": comm.mean_over_ranks(torch.tensor([rank, 4])).tolist(),
    "unchanged": float(x),
}
comm.create_local_process_group(1)
result["local"] = [comm.get_local_rank(), comm.get_local_size()]
try:
    comm.create_local_process_group(1)
except RuntimeError:
    result["twice"] = "refused"
comm.synchronize()
dist.destroy_process_group()
print(json.dumps(result))
"""


def test_world_of_two(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    outputs = [worker.communicate(timeout=100)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    first, second = (json.loads(output.splitlines()[-1]) for output in outputs)
    assert (first["rank"], second["rank"]) == (0, 1)
    assert (first["main"], second["main"]) == (True, False)
    assert (first["at0"], second["at0"]) == ([0, 1], [])
    assert (first["at1"], second["at1"]) == ([], [0, 1])
    assert first["seed"] == second["seed"]
    for result in (first, second):
        assert result["world"] == 2
        assert result["all"] == [{"r": 0}, {"r": 1}]
        assert result["sum"] == 6.0
        assert result["mean"] == {"a": 3.0, "b": 1.5}
        assert result["over"] == [0.5, 4.0]
        assert result["unchanged"] == result["rank"] + 1
        assert result["local"] == [0, 1]
        assert result["twice"] == "refused"


def test_a_model_is_unwrapped():
    model = torch.nn.Linear(2, 2)
    assert comm.unwrap_model(torch.nn.DataParallel(model)) is model
    assert comm.unwrap_model(model) is model
