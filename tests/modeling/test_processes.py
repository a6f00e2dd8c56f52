"""Two processes with half the batch each learn what one process with the whole batch learns."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support.train_in_processes import NAMES, train

REPOSITORY = Path(__file__).parents[2]
STEPS = 20
RPN = {"loss_rpn_cls", "loss_rpn_loc"}
LOSSES = {
    "GeneralizedRCNN": {"loss_cls", "loss_box_reg", "loss_mask", *RPN},
    "cascade with keypoints": {
        *(f"{loss}_stage{k}" for loss in ("loss_cls", "loss_box_reg") for k in range(3)),
        *("loss_mask", "loss_keypoint", *RPN),
    },
    "PointRend": {"loss_cls", "loss_box_reg", "loss_mask", "loss_mask_point", *RPN},
    "class weights": {"loss_cls", "loss_box_reg", "loss_mask", *RPN},
    "RetinaNet": {"loss_cls", "loss_box_reg"},
    "SemanticSegmentor": {"loss_sem_seg"},
}


def start(rank: int, world: int, folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.support.train_in_processes"]
    return subprocess.Popen(
        [*command, str(rank), str(world), str(STEPS), str(folder)], cwd=REPOSITORY
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    processes = [start(rank, 2, folder) for rank in range(2)]
    alone = {name: train(name, 0, 1, STEPS) for name in NAMES}
    assert [p.wait(timeout=120) for p in processes] == [0, 0]
    return alone, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", NAMES)
def test_mean_of_two_processes_is_the_loss_of_one(runs, name):
    one, two = runs[0][name], [run[name] for run in runs[1]]
    assert set(one) == LOSSES[name]
    for key, expected in one.items():
        mean = (np.array(two[0][key]) + np.array(two[1][key])) / 2
        np.testing.assert_allclose(mean, expected, rtol=1e-4, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_the_two_halves_differ_and_the_loss_moves(runs, name):
    """Otherwise the equality above would show nothing."""
    one, two = runs[0][name], [run[name] for run in runs[1]]
    for key, first in two[0].items():
        assert not np.allclose(first, two[1][key], rtol=1e-2), key
    total = np.sum([*one.values()], axis=0)
    assert not np.isclose(total[15], total[0], rtol=0.05)  # the same images, other weights
