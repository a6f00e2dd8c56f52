"""The scripts, on a tiny ward: train, resume, evaluate, predict, look at the data; bad input."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from d2kit.config import get_cfg
from d2kit.data import DatasetCatalog, MetadataCatalog
from d2kit.engine import default_argument_parser
from d2kit.modeling import build_model
from project import patient_video
from project.patient_video.dataset import WardSpec

REPO = Path(__file__).parents[2]
TINY = {
    "MODEL": {
        "DEVICE": "cpu",
        "FPN": {"OUT_CHANNELS": 32},
        "RPN": {"POST_NMS_TOPK_TRAIN": 30, "POST_NMS_TOPK_TEST": 20, "BATCH_SIZE_PER_IMAGE": 32},
        "ROI_HEADS": {"BATCH_SIZE_PER_IMAGE": 16},
        "ROI_BOX_HEAD": {"FC_DIM": 32},
        "ROI_MASK_HEAD": {"CONV_DIM": 32, "NUM_CONV": 1},
    },
    "INPUT": {"MIN_SIZE_TRAIN": [64], "MIN_SIZE_TEST": 64},
    "SOLVER": {"MAX_ITER": 4, "CHECKPOINT_PERIOD": 2, "IMS_PER_BATCH": 2, "WARMUP_ITERS": 0}
    | {"AMP": {"ENABLED": False}},
    "DATALOADER": {"NUM_WORKERS": 0},
}


def _script(name):
    spec = importlib.util.spec_from_file_location(f"script_{name}", REPO / f"tools/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a tiny ward dataset and a tiny config; datasets are found through the env."""
    root = tmp_path_factory.mktemp("workplace")
    before = os.environ.get("D2KIT_DATASETS")
    os.environ["D2KIT_DATASETS"] = str(root / "data")
    spec = WardSpec(train_videos=1, test_videos=1, seconds=1.0, stride=5, train_stride=5)
    patient_video.generate(root / "data/patient_video", spec, workers=1)
    (root / "override.yaml").write_text(yaml.safe_dump({**TINY, "OUTPUT_DIR": str(root / "run")}))
    cfg = get_cfg()
    cfg.merge_from_file(str(REPO / "configs/PatientVideo/mask_rcnn_R_18_FPN_demo.yaml"))
    cfg.merge_from_file(str(root / "override.yaml"))
    (root / "tiny.yaml").write_text(cfg.dump())
    _forget()
    yield root
    _forget()
    os.environ.pop("D2KIT_DATASETS")
    if before is not None:
        os.environ["D2KIT_DATASETS"] = before


def _forget():
    """Take the experiments' datasets off the catalog: others may have registered them elsewhere."""
    for name in DatasetCatalog.list():
        if name.startswith(("patient_video_", "pennfudan_", "cars_")):
            DatasetCatalog.remove(name)
            MetadataCatalog.pop(name, None)


def _train(workplace, *extra, script="train_net"):
    arguments = ["--config-file", str(workplace / "tiny.yaml"), *extra]
    return _script(script).main(default_argument_parser().parse_args(arguments))


def _metrics(run):
    lines = [json.loads(x) for x in (run / "metrics.json").read_text().splitlines()]
    return {x["iteration"]: x for x in lines if "total_loss" in x}


def test_train_resume_evaluate(workplace):
    first = _train(workplace)
    run = workplace / "run"
    assert {"bbox", "segm"} <= set(first)
    assert (run / "model_final.pth").is_file()
    assert (run / "config.yaml").is_file()
    again = _train(workplace, "--eval-only", "MODEL.WEIGHTS", str(run / "model_final.pth"))
    assert json.dumps(again) == json.dumps(first), "the same AP to the last digit"
    resumed = _train(workplace, "--resume", "SOLVER.MAX_ITER", "6")
    assert {"bbox", "segm"} <= set(resumed)
    assert torch.load(run / "model_final.pth", weights_only=True)["iteration"] == 5


def test_dry_run_says_what_would_be_trained_and_stops(workplace):
    script, run = _script("train_net"), workplace / "dry"
    config = ["--config-file", str(workplace / "tiny.yaml"), "OUTPUT_DIR", str(run)]
    sizes = ["MODEL.ANCHOR_GENERATOR.SIZES", str([[512]] * 5)]  # on images of 64 pixels
    frozen = ["MODEL.BACKBONE.FREEZE_AT", "1"]
    arguments = ["--dry-run", *config, *sizes, *frozen]
    assert script.main(script.argument_parser().parse_args(arguments)) == {}
    text = (run / "log.txt").read_text().split("Preflight\n")[1]
    images = len(DatasetCatalog.get("patient_video_train"))
    assert f"4 iterations = {8 / images:.1f} epochs over {images} images" in text
    assert "best IoU below 0.5 for 100.0% of " in text
    assert "(resized: short side 64, long side at most " in text
    assert "MODEL.ANCHOR_GENERATOR.SIZES [[" in text
    stem = next(line.split() for line in text.splitlines() if "backbone.bottom_up.stem" in line)
    assert stem[1:] == ["0", f"{3 * 64 * 49 + 2 * 64:,}"]  # convolution and norm
    assert "Training from iteration" not in text
    assert not list(run.glob("*.pth"))


def test_test_time_augmentation_of_the_config(workplace):
    """At the end of training and with --eval-only; the one version is the plain one's size."""
    run = workplace / "augmented"
    sizes = ["TEST.AUG.MIN_SIZES", "(64,)", "TEST.AUG.MAX_SIZE", "1333", "TEST.AUG.FLIP", "False"]
    options = ["TEST.AUG.ENABLED", "True", *sizes, "OUTPUT_DIR", str(run)]
    results = _train(workplace, *options, "SOLVER.MAX_ITER", "2")
    assert {"bbox", "segm", "bbox_TTA", "segm_TTA"} <= set(results)
    for task in ("bbox", "segm"):
        assert results[f"{task}_TTA"] == pytest.approx(results[task], abs=1e-3, nan_ok=True)
    assert (run / "TTA/inference/coco_instances_results.json").is_file()
    weights = ["MODEL.WEIGHTS", str(run / "model_final.pth")]
    again = _train(workplace, "--eval-only", *options, *weights)
    assert json.dumps(again) == json.dumps(results)
    lines = (run / "metrics.json").read_text().splitlines()
    assert any("bbox_TTA/AP" in json.loads(line) for line in lines)


def test_plain_loop_trains_the_same_model(workplace):
    _train(workplace, "OUTPUT_DIR", str(workplace / "trainer"))
    _train(workplace, "OUTPUT_DIR", str(workplace / "plain"), script="plain_train_net")
    last = [_metrics(workplace / name)[3]["total_loss"] for name in ("trainer", "plain")]
    assert last[0] == pytest.approx(last[1], rel=1e-5)


def test_predict_and_visualize(workplace, monkeypatch, capsys):
    weights = workplace / "random.pth"
    cfg = get_cfg()
    cfg.merge_from_file(str(workplace / "tiny.yaml"))
    torch.save({"model": build_model(cfg).state_dict()}, weights)
    out = workplace / "predictions"
    frames = workplace / "data/patient_video/frames/video01"
    arguments = ["--config-file", workplace / "tiny.yaml", "--output", out]
    arguments += ["--confidence-threshold", "0.0", "--input", frames, "MODEL.WEIGHTS", weights]
    monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, arguments)])
    _script("predict").main()
    result = json.loads((out / "predictions.json").read_text())
    assert len(result["images"]) == 3
    assert [c["name"] for c in result["categories"]] == ["patient", "staff"]
    assert result["annotations"]
    assert result["annotations"][0]["segmentation"]["size"] == [240, 320]
    assert len(list((out / "overlays").glob("*.jpg"))) == 3
    assert "best score" in capsys.readouterr().out

    for source in ("dataloader", "annotation"):
        look = workplace / f"look_{source}"
        arguments = ["--config-file", workplace / "tiny.yaml", "--source", source]
        arguments += ["--output-dir", look, "--count", "2"]
        monkeypatch.setattr(sys, "argv", ["visualize_data.py", *map(str, arguments)])
        _script("visualize_data").main()
        assert len(list(look.glob("*.jpg"))) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["DATASETS.TRAIN", "('patient_vide_train',)"], ["patient_video_train"]),
        (["SOLVER.BASELR", "0.1"], ["SOLVER.BASELR", "BASE_LR"]),
        (["MODEL.WEIGHTS", "/nowhere/model.pth"], ["/nowhere/model.pth"]),
        (["MODEL.ROI_HEADS.NUM_CLASSES", "7"], ["7", "2", "NUM_CLASSES"]),
        (["SOLVER.IMS_PER_BATCH", "'two'"], ["SOLVER.IMS_PER_BATCH"]),
    ],
)
def test_bad_options(workplace, capsys, options, words):
    with pytest.raises(SystemExit) as stop:
        _train(workplace, "OUTPUT_DIR", str(workplace / "bad"), *options)
    assert stop.value.code not in (0, None)
    message = capsys.readouterr()
    for word in words:
        assert word in message.err + message.out + str(stop.value.code)
    assert not (workplace / "bad/model_final.pth").exists()


def _broken(workplace, name, change):
    """Register a copy of the training set whose JSON text went through `change`."""
    folder = workplace / "data/patient_video"
    text = (folder / "train.json").read_text()
    (folder / f"{name}.json").write_text(change(text))
    from d2kit.data.datasets import register_coco_instances

    if name not in DatasetCatalog.list():
        register_coco_instances(name, {}, str(folder / f"{name}.json"), str(folder))


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("cut_json", lambda t: t[: len(t) // 2], ["cut_json.json:1:", "not valid JSON"]),
        ("lost_file", lambda t: t.replace("000005.jpg", "999999.jpg"), ["999999.jpg"]),
        ("other_size", lambda t: t.replace('"width": 320', '"width": 321'), ["321", "320"]),
    ],
)
def test_bad_datasets(workplace, capsys, name, change, words):
    _broken(workplace, name, change)
    options = ["DATASETS.TRAIN", f"('{name}',)", "OUTPUT_DIR", str(workplace / "bad")]
    with pytest.raises(SystemExit) as stop:
        _train(workplace, *options)
    assert stop.value.code not in (0, None)
    message = capsys.readouterr()
    for word in words:
        assert word in message.err + message.out + str(stop.value.code)


@pytest.mark.slow
def test_each_process_knows_the_datasets_of_the_checkout(workplace, tmp_path):
    """From another folder; the processes that the script starts register them anew."""
    command = [sys.executable, str(REPO / "tools/train_net.py"), "--num-processes", "2"]
    command += ["--dry-run", "--config-file", str(workplace / "tiny.yaml")]
    command += ["OUTPUT_DIR", str(tmp_path / "two")]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "Preflight" in (tmp_path / "two/log.txt").read_text()


def test_missing_config_in_a_real_process():
    """As a user sees it: one clear message, no traceback, exit code not 0."""
    command = [sys.executable, str(REPO / "tools/train_net.py"), "--config-file", "no/such.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode not in (0, -6, -11)
    assert "no/such.yaml" in done.stderr
    assert "Traceback" not in done.stderr
