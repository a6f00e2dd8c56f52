import json

import numpy as np
import pytest
from PIL import Image

from d2kit.visualization.plots import plot_losses, read_metrics


def write(path, rows, tail=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)


def rows(with_ap=True):
    for i in range(0, 100, 10):
        row = {"iteration": i, "total_loss": 3 - i / 50, "loss_cls": 1 - i / 100, "lr": 0.1}
        if with_ap and i % 50 == 40:
            row |= {"bbox/AP": 30.0 + i, "segm/AP": None}  # as JSONWriter writes NaN
        yield row


@pytest.mark.parametrize("with_ap", [True, False])
def test_picture(tmp_path, with_ap):
    write(tmp_path / "metrics.json", rows(with_ap), tail='{"iteration": 1')
    path = plot_losses(tmp_path / "metrics.json", tmp_path / "loss.png")
    picture = np.asarray(Image.open(path).convert("RGB"))
    assert min(picture.shape[:2]) > 400
    orange = (np.abs(picture.astype(int) - (0xE0, 0x7A, 0x00)).max(axis=2) < 10).sum()
    assert (orange > 50) == with_ap


def test_resumed_run_overwrites_its_iterations(tmp_path):
    write(tmp_path / "m.json", [{"iteration": 1, "total_loss": 5.0}, {"iteration": 1, "a": 2}])
    assert read_metrics(tmp_path / "m.json") == [{"iteration": 1, "total_loss": 5.0, "a": 2}]


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        plot_losses(tmp_path / "none.json", tmp_path / "a.png")


def test_no_loss(tmp_path):
    write(tmp_path / "m.json", [{"iteration": 1, "lr": 2}])
    with pytest.raises(ValueError, match="total_loss"):
        plot_losses(tmp_path / "m.json", tmp_path / "a.png")
