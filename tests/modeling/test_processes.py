"""Two processes with half the batch each learn what one process with the whole batch learns."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.modeling.train_in_processes import train

REPOSITORY = Path(__file__).parents[2]
STEPS = 20


def start(rank: int, world: int, folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.modeling.train_in_processes"]
    return subprocess.Popen(
        [*command, str(rank), str(world), str(STEPS), str(folder)], cwd=REPOSITORY
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    processes = [start(rank, 2, folder) for rank in range(2)]
    alone = train(0, 1, STEPS, folder)
    assert [p.wait(timeout=120) for p in processes] == [0, 0]
    return alone, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


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
