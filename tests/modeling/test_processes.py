"""Two processes with half the batch each learn what one process with the whole batch learns."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

REPOSITORY = Path(__file__).parents[2]
STEPS = 20


def run(rank: int, world: int, folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.modeling.train_in_processes"]
    return subprocess.Popen(
        [*command, str(rank), str(world), str(STEPS), str(folder)], cwd=REPOSITORY
    )


def curves(world: int, folder: Path) -> list[dict[str, list[float]]]:
    folder.mkdir()
    processes = [run(rank, world, folder) for rank in range(world)]
    assert [p.wait(timeout=120) for p in processes] == [0] * world
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    return curves(1, folder / "one")[0], curves(2, folder / "two")


def test_mean_of_two_processes_is_the_loss_of_one(runs):
    one, two = runs
    assert set(one) >= {"loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls", "loss_rpn_loc"}
    for name, expected in one.items():
        mean = (np.array(two[0][name]) + np.array(two[1][name])) / 2
        np.testing.assert_allclose(mean, expected, rtol=1e-4, atol=1e-6, err_msg=name)


def test_the_two_halves_differ_and_the_loss_moves(runs):
    """Otherwise the equality above would show nothing."""
    one, two = runs
    assert not np.allclose(two[0]["loss_mask"], two[1]["loss_mask"], rtol=1e-2)
    assert one["loss_cls"][-1] < 0.8 * one["loss_cls"][0]
