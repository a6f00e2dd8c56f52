"""tools/convert_weights.py, from the command line."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).parents[2]
MMDETECTION = {
    "roi_head.bbox_head.fc_cls.weight": torch.arange(4.0).view(2, 2),
    "backbone.conv1.weight": torch.ones(1, 1, 1, 1),
    "rpn_head.rpn_reg.weight": torch.ones(12, 1, 1, 1),
    "roi_head.bbox_head.fc_cls.bias": torch.ones(2),
    "neck.lateral_convs.0.conv.bias": torch.ones(3),
}


def convert(*arguments):
    return subprocess.run(
        [sys.executable, "tools/convert_weights.py", *map(str, arguments)],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_file_is_converted(tmp_path):
    torch.save({"meta": {"CLASSES": ("cat",)}, "state_dict": MMDETECTION}, tmp_path / "mm.pth")
    run = convert(tmp_path / "mm.pth", tmp_path / "tv.pth", "--to", "torchvision")
    assert run.returncode == 0, run.stderr
    assert "names of MMDetection's R-CNN; 5 weights to" in run.stdout
    converted = torch.load(tmp_path / "tv.pth", weights_only=True)
    assert converted["roi_heads.box_predictor.cls_score.weight"].tolist() == [[2, 3], [0, 1]]
    assert "backbone.fpn.inner_blocks.0.0.bias" in converted


@pytest.mark.parametrize(
    ("source", "message"),
    [("absent.pth", "not found"), ("page.pth", "not a readable file of torch.save")],
)
def test_mistakes_are_one_line(tmp_path, source, message):
    (tmp_path / "page.pth").write_text("<html>")
    run = convert(tmp_path / source, tmp_path / "out.pth")
    assert run.returncode != 0
    assert message in run.stderr
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "out.pth").exists()
