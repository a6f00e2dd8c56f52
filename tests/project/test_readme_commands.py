"""The commands of the experiments' READMEs, on a small budget."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*words, data):
    environment = {**os.environ, "D2KIT_DATASETS": str(data), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_cars(tmp_path):
    out = tmp_path / "run"
    printed = run("datasets/prepare_cars.py", "--synthetic", data=tmp_path)
    assert "train" in printed
    common = ["--config-file", "configs/Cars/mask_rcnn_R_18_FPN_scratch.yaml"]
    options = ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", out, "DATALOADER.NUM_WORKERS", "0"]
    small = ["SOLVER.MAX_EPOCHS", "0.1", "TEST.EVAL_EPOCHS", "0", "INPUT.FIXED_SIZE", "[64, 96]"]
    run("tools/train_net.py", *common, *options, *small, data=tmp_path)
    run(
        *("tools/train_net.py", *common, "--eval-only", "--resume", *options, *small),
        *("DATASETS.TEST", "('cars_test',)"),
        data=tmp_path,
    )
    report = json.loads((out / "inference/classification_report.json").read_text())
    assert sum(map(sum, report["image"]["confusion"])) == 80
    assert (out / "inference/confusion.png").is_file()


@pytest.mark.slow
def test_pedestrians(tmp_path):
    archive = ROOT.parent / "shared/datasets/PennFudanPed.zip"
    if not archive.is_file():
        pytest.skip(f"{archive} is not on this machine")
    run("datasets/prepare_pennfudan.py", "--zip", archive, data=tmp_path)
    printed = run(
        *("tools/train_net.py", "--config-file", "configs/PennFudan/mask_rcnn_R_50_FPN.yaml"),
        *("MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu", "MODEL.RESNETS.NORM", "GN"),
        *("MODEL.FPN.NORM", "GN", "MODEL.BACKBONE.FREEZE_AT", "0", "MODEL.RESNETS.DEPTH", "50"),
        *("SOLVER.CLIP_GRADIENTS.ENABLED", "True", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model"),
        *("INPUT.MIN_SIZE_TRAIN", "(96,)", "INPUT.MIN_SIZE_TEST", "96", "SOLVER.MAX_ITER", "3"),
        *("DATALOADER.NUM_WORKERS", "0", "TEST.EVAL_PERIOD", "0", "OUTPUT_DIR", tmp_path / "run"),
        data=tmp_path,
    )
    assert "bbox" in printed


@pytest.mark.slow
def test_patients(tmp_path):
    printed = run(
        *("-m", "project.patient_video.demo", "SOLVER.MAX_ITER", "4", "SOLVER.WARMUP_ITERS", "1"),
        *("DATALOADER.NUM_WORKERS", "0", "INPUT.MIN_SIZE_TEST", "64", "INPUT.MIN_SIZE_TRAIN"),
        *("(64,)", "OUTPUT_DIR", tmp_path / "run"),
        data=tmp_path,
    )
    assert "patient followed with one identity" in printed
    assert (tmp_path / "run/tracked/annotated.mp4").is_file()
    assert (tmp_path / "run/contact_sheet.jpg").is_file()
