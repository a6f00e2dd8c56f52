"""The commands of the experiments' READMEs, on a small budget: few small images and iterations."""

import functools
import hashlib
import http.server
import json
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from d2kit import model_zoo
from d2kit.modeling import build_model
from tests.support.archives import pennfudan_archive

ROOT = Path(__file__).parents[2]
CPU = ["MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", "0"]


def run(*words, data, status=0, **environment):
    environment = {
        **os.environ,
        "D2KIT_DATASETS": str(data),
        "OMP_NUM_THREADS": "1",
        **{name: str(value) for name, value in environment.items()},
    }
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == status, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def train(config, out, *options, data, flags=(), **environment):
    """Run tools/train_net.py as a README does, with more options; return what it printed."""
    common = ["--config-file", f"configs/{config}", *flags, *CPU, "OUTPUT_DIR", out]
    return run("tools/train_net.py", *common, *options, data=data, **environment)


def keep_images(file: Path, count: int) -> None:
    """Leave only the first images in a COCO JSON file."""
    coco = json.loads(file.read_text())
    coco["images"] = coco["images"][:count]
    kept = {image["id"] for image in coco["images"]}
    coco["annotations"] = [a for a in coco["annotations"] if a["image_id"] in kept]
    file.write_text(json.dumps(coco))


# ---- cars


@pytest.fixture(scope="module")
def car_data(tmp_path_factory):
    data = tmp_path_factory.mktemp("cars")
    printed = run("datasets/prepare_cars.py", "--synthetic", "--count", "5", data=data)
    assert "12 / 4 / 4 pictures of 160 x 240" in printed
    return data


@pytest.mark.slow
def test_cars_in_folders(car_data, tmp_path):
    printed = run("datasets/prepare_cars.py", car_data / "cars/images", "--frame", data=tmp_path)
    assert "not the published set" in printed
    assert json.loads((tmp_path / "cars/val.json").read_text())["annotations"][0]["area"] == 38400


@pytest.mark.slow
def test_cars(car_data, tmp_path):
    config, small = "Cars/mask_rcnn_R_18_FPN_scratch.yaml", ["INPUT.FIXED_SIZE", "[64, 96]"]
    printed = train(config, tmp_path, *small, "SOLVER.MAX_EPOCHS", "2", data=car_data)
    assert "6 iterations = 2.0 epochs over 12 images" in printed
    table = printed.split("epochs.png):\n")[1]
    assert "accuracy by image" in table.splitlines()[0]
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:4]] == ["1", "2"]
    assert (tmp_path / "epochs.png").is_file()
    test = ["DATASETS.TEST", "('cars_test',)"]
    train(config, tmp_path, *small, *test, data=car_data, flags=("--eval-only", "--resume"))
    report = json.loads((tmp_path / "inference/classification_report.json").read_text())
    assert sum(map(sum, report["image"]["confusion"])) == 4
    assert (tmp_path / "inference/confusion.png").is_file()


@pytest.mark.slow
def test_published_recipe_of_cars(car_data, tmp_path):
    from torchvision.models import resnet50

    torch.save(resnet50(weights=None).state_dict(), tmp_path / "resnet50.pth")
    printed = train(
        *("Cars/mask_rcnn_R_50_FPN.yaml", tmp_path, "MODEL.WEIGHTS", tmp_path / "resnet50.pth"),
        *("INPUT.FIXED_SIZE", "[64, 64]", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_EPOCHS", "0.3"),
        data=car_data,
    )
    assert "Weights of a torchvision ResNet" in printed
    assert "RandomRotation" in printed
    assert "RandomCrop" in printed
    assert "Classification by image" in printed


# ---- pedestrians


@pytest.fixture(scope="module")
def pedestrian_data(tmp_path_factory):
    data = tmp_path_factory.mktemp("pedestrians")
    archive = pennfudan_archive(data)
    run("datasets/prepare_pennfudan.py", "--zip", archive, data=data)
    keep_images(data / "pennfudan/train.json", 8)
    keep_images(data / "pennfudan/test.json", 2)
    return data


SMALL = ["INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"]
BRIEF = ["SOLVER.MAX_EPOCHS", "0.5"]


@pytest.mark.slow
def test_pedestrians_from_scratch(pedestrian_data, tmp_path):
    config = "PennFudan/mask_rcnn_R_18_FPN_scratch.yaml"
    printed = train(config, tmp_path / "a", *SMALL, "SOLVER.MAX_ITER", "2", data=pedestrian_data)
    assert "bbox" in printed
    printed = train(
        *("PennFudan/mask_rcnn_R_50_FPN.yaml", tmp_path / "b", "MODEL.WEIGHTS", ""),
        *("MODEL.RESNETS.NORM", "GN", "MODEL.FPN.NORM", "GN", "MODEL.BACKBONE.FREEZE_AT", "0"),
        *("SOLVER.CLIP_GRADIENTS.ENABLED", "True", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model"),
        *("TEST.EVAL_PERIOD", "0", *SMALL, "SOLVER.MAX_ITER", "2"),
        data=pedestrian_data,
    )
    assert "bbox" in printed


@pytest.mark.slow
def test_fine_tuning_from_the_zoo(pedestrian_data, tmp_path):
    zoo = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml"
    cfg = model_zoo.get_config(zoo)
    cfg.MODEL.DEVICE = "cpu"
    weights = {name: value.numpy() for name, value in build_model(cfg).state_dict().items()}
    name = model_zoo.get_checkpoint_url(zoo).rpartition("/")[2]
    with open(tmp_path / name, "wb") as file:
        pickle.dump({"model": weights, "__author__": "a test"}, file)
    printed = train(
        *("PennFudan/mask_rcnn_R_50_FPN_finetune.yaml", tmp_path / "run", *SMALL, *BRIEF),
        data=pedestrian_data,
        D2KIT_WEIGHTS=tmp_path,
    )
    assert "2 iterations = 0.5 epochs over 8 images" in printed
    assert "(81 -> 2)" in printed
    assert "box AP" in printed.split("epochs.png):\n")[1].splitlines()[0]


@pytest.mark.slow
def test_fine_tuning_from_torchvision(pedestrian_data, tmp_path):
    """Its file name and its names of weights, through a download; 91 classes become one."""
    from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights, maskrcnn_resnet50_fpn

    name = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.url.rpartition("/")[2]
    model = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    assert len(model.roi_heads.box_predictor.cls_score.bias) == 91
    (tmp_path / "models").mkdir()
    torch.save(model.state_dict(), tmp_path / "models" / name)
    digest = hashlib.sha256((tmp_path / "models" / name).read_bytes()).hexdigest()
    (tmp_path / "models" / name).rename(
        tmp_path / "models" / (name := f"{name.rpartition('-')[0]}-{digest[:8]}.pth")
    )

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    serve = functools.partial(Handler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,)).start()
        try:
            printed = train(
                *("PennFudan/maskrcnn_resnet50_fpn_finetune.yaml", tmp_path / "run"),
                *("MODEL.WEIGHTS", f"http://127.0.0.1:{server.server_port}/models/{name}"),
                *(*SMALL, *BRIEF),
                data=pedestrian_data,
                **{"D2KIT_CACHE": tmp_path / "cache", "no_proxy": "127.0.0.1"},
            )
        finally:
            server.shutdown()
    assert list((tmp_path / "cache").rglob(name))
    [line] = [text for text in printed.splitlines() if "of the model's" in text]
    assert "roi_heads.box_predictor.cls_score (91 -> 2)" in line
    assert "roi_heads.box_predictor.bbox_pred (360 -> 4)" in line
    assert "roi_heads.mask_head.predictor (90 -> 1)" in line
    assert "Loaded 301 of the model's 307 weights" in line
    assert "not in the" not in printed


# ---- patients


@pytest.mark.slow
def test_patients(tmp_path):
    """`make demo`, and what may follow it."""
    printed = run(
        *("-m", "project.patient_video.demo", "--quick", "OUTPUT_DIR", tmp_path / "run", *SMALL),
        *("SOLVER.MAX_ITER", "4", "SOLVER.WARMUP_ITERS", "1", "TEST.DETECTIONS_PER_IMAGE", "10"),
        *("DATALOADER.NUM_WORKERS", "0"),
        data=tmp_path,
    )
    assert "patient followed with one identity" in printed
    assert (tmp_path / "run/tracked/annotated.mp4").is_file()
    assert (tmp_path / "run/contact_sheet.jpg").is_file()
    assert f"Results page: {tmp_path / 'run/report.html'}" in printed


@pytest.fixture(scope="module")
def ward_data(tmp_path_factory):
    data = tmp_path_factory.mktemp("ward")
    sizes = ["--train-videos", "2", "--test-videos", "4", "--seconds", "3", "--stride", "15"]
    run("datasets/prepare_patient_video.py", *sizes, data=data)
    return data


@pytest.mark.slow
def test_own_videos(ward_data, tmp_path):
    """Frames, splits, leaks, training, AP of each video, following the patient."""
    videos, frames = ward_data / "patient_video/videos", tmp_path / "frames"
    run(
        *("datasets/prepare_video_frames.py", videos, "--fps", "2", "--output", frames),
        data=ward_data,
    )
    coco = json.loads((frames / "frames.json").read_text())
    assert len(coco["images"]) == 24
    coco["categories"] = [{"id": 1, "name": "patient"}]
    annotated = frames / "annotated.json"
    annotated.write_text(json.dumps(coco))
    split = ["tools/split_data.py", annotated, "--images", frames]
    run(*split, "--group", "video", "--parts", "train=0.5", "test=0.5", data=ward_data)
    check = ["tools/split_data.py", "--check", frames / "train.json", frames / "test.json"]
    assert "0 groups and 0 pairs" in run(*check, "--images", frames, data=ward_data)
    run(*split, "--method", "random", "--parts", "train=0.5", "test=0.5", data=ward_data)
    assert "look the same" in run(*check, "--images", frames, data=ward_data, status=1)


@pytest.mark.slow
def test_patients_step_by_step(ward_data, tmp_path):
    out = tmp_path / "run"
    small = [*SMALL, "SOLVER.MAX_ITER", "4", "SOLVER.WARMUP_ITERS", "1"]
    train("PatientVideo/mask_rcnn_R_18_FPN_demo.yaml", out, *small, data=ward_data)
    printed = run(
        *("tools/evaluate_groups.py", "--dataset", ward_data / "patient_video/test.json"),
        *("--results", out / "inference/coco_instances_results.json", "--samples", "50"),
        data=ward_data,
    )
    assert [line for line in printed.splitlines() if line.startswith("| video")]
    assert "all, by group" in printed
    run(
        *("tools/track_video.py", "--config-file", out / "config.yaml"),
        *("--input", videos(ward_data)[0], "--output", tmp_path / "ward"),
        *("MODEL.WEIGHTS", out / "model_final.pth", "MODEL.ROI_HEADS.NMS_THRESH_TEST", "0.3"),
        data=ward_data,
    )
    assert (tmp_path / "ward/annotated.mp4").is_file()
    run(
        *("-m", "project.patient_video.analyze", "--tracks", tmp_path / "ward"),
        *("--truth", ward_data / f"patient_video/tracks/{videos(ward_data)[0].stem}.json"),
        data=ward_data,
    )
    assert (tmp_path / "ward/report.json").is_file()


def videos(data):
    return sorted((data / "patient_video/videos").glob("*.mp4"))
