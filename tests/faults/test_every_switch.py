"""FAULTS 4, 5, 6: with every switch on and three kills, the demo ends as if nothing had happened.

A small Mask R-CNN on the synthetic ward, with averaged weights, bfloat16, accumulation,
validation loss, early stopping, best checkpoint, several scales, crops, wide and tall images,
loader workers. The kills come between the two halves of an accumulated batch, inside a save, and
inside an evaluation.

Fails without: `repeat_missed_evaluation` in `DefaultTrainer.before_train` (another best
checkpoint, another end), ``"last"`` in `EventStorage.state_dict` (an evaluation is missing in
``metrics.json``), its `count_samples` (other medians), `WeightAveraging.state_dict` (other
averages), `EarlyStopping.state_dict` (another end).

40 iterations; ``D2KIT_FAULTS_STEPS=2000 pytest -m faults -s tests/faults/test_every_switch.py``
does 2,000 of the demo's data, and prints the digests.
"""

import json
import os
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from pycocotools import mask as mask_util
from safetensors.torch import load_file

from d2kit.config import get_cfg
from d2kit.data import DatasetCatalog, MetadataCatalog
from d2kit.engine import CallbackHook, DefaultTrainer
from d2kit.utils.env import seed_all_rng
from project import patient_video
from tests.support import fault_runs as runs
from tests.support import tiny_run as tiny

pytestmark = pytest.mark.faults(4, 5, 6)
STEPS = int(os.environ.get("D2KIT_FAULTS_STEPS", "40"))
LONG = STEPS >= 1000  # on the demo's own data
SAVE = STEPS // 10  # iterations between two checkpoints
EVALUATE = 2 * SAVE + SAVE // 2  # some evaluations coincide with a checkpoint, some do not
CONFIG = Path(__file__).parents[2] / "configs/PatientVideo/mask_rcnn_R_18_FPN_demo.yaml"
MIXED = "faults_ward_wide_and_tall"
MEASURED = re.compile("time|eta|second")
SMALL = (
    *("MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.OUT_FEATURES", ["res3"]),
    *("MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.NORM", "BN", "MODEL.RESNETS.WIDTH_PER_GROUP", 8),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 16),
    *("MODEL.RPN.IN_FEATURES", ["res3"], "MODEL.ROI_HEADS.IN_FEATURES", ["res3"]),
    *("MODEL.ANCHOR_GENERATOR.SIZES", [[16, 32, 64]], "MODEL.ROI_BOX_HEAD.FC_DIM", 32),
    *("MODEL.ROI_MASK_HEAD.NORM", "BN", "MODEL.ROI_MASK_HEAD.NUM_CONV", 1),
    *("MODEL.ROI_MASK_HEAD.CONV_DIM", 16, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16),
    *("MODEL.RPN.PRE_NMS_TOPK_TRAIN", 100, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 50),
)
SWITCHES = (
    *("SOLVER.EMA.ENABLED", True, "SOLVER.EMA.DECAY", 0.99),
    *("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "bfloat16"),
    *("SOLVER.ACCUMULATE_STEPS", 2, "SOLVER.IMS_PER_BATCH", 2),
    *("TEST.VALIDATION_LOSS", True, "TEST.BEST_METRIC", "validation/total_loss"),
    *("SOLVER.EARLY_STOPPING.PATIENCE", 3, "SOLVER.EARLY_STOPPING.METRIC", "bbox/AP"),
    *("INPUT.MIN_SIZE_TRAIN", (48, 56, 64), "INPUT.MAX_SIZE_TRAIN", 160),
    *("INPUT.MIN_SIZE_TEST", 64, "INPUT.CROP.ENABLED", True),
    *("DATALOADER.ASPECT_RATIO_GROUPING", True, "DATALOADER.NUM_WORKERS", 2),
)


def register(root):
    """Register the ward; MIXED is its training set with every third image turned on its side."""
    if MIXED in DatasetCatalog.list():
        return
    patient_video.register(root)
    DatasetCatalog.register(MIXED, lambda: mixed(root / "turned"))
    classes = MetadataCatalog.get(patient_video.TRAIN).thing_classes
    MetadataCatalog.get(MIXED).set(thing_classes=classes)


def mixed(folder):
    records = DatasetCatalog.get(patient_video.TRAIN)
    folder.mkdir(exist_ok=True)
    for record in records[::3]:
        path = folder / f"{record['image_id']}.png"
        if not path.exists():
            cv2.imwrite(str(path), cv2.imread(record["file_name"]).transpose(1, 0, 2))
        record["file_name"] = str(path)
        record["height"], record["width"] = record["width"], record["height"]
        for one in record["annotations"]:
            x, y, width, height = one["bbox"]
            one["bbox"] = [y, x, height, width]
            mask = mask_util.decode(one["segmentation"]).T
            one["segmentation"] = mask_util.encode(np.asfortranarray(mask))
    return records


class Kill:
    """Kills this process in an iteration: in its ``batch``, its ``save`` or its ``evaluation``."""

    def __init__(self, where, step):
        self.where, self.step = where, step
        self.calls = 0

    def __call__(self, trainer):
        if trainer.iter != self.step:
            return
        if self.where == "save":
            sys.setprofile(self.look)
        else:
            trainer.model.register_forward_pre_hook(self.forward)

    def look(self, frame, event, arg):
        if event == "c_call" and getattr(arg, "__name__", "") == "write_record":
            self.count(100)

    def forward(self, model, args):
        if (self.where == "batch") == torch.is_grad_enabled():
            self.count(2)

    def count(self, last):
        self.calls += 1
        if self.calls == last:
            os.kill(os.getpid(), signal.SIGKILL)


def train(root, output, options, kill=None):
    """Train or go on."""
    register(root)
    cfg = get_cfg()
    cfg.merge_from_file(str(CONFIG))
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "DATASETS.TRAIN", (MIXED,), *SWITCHES])
    cfg.merge_from_list(["SOLVER.MAX_ITER", STEPS, "SOLVER.WARMUP_ITERS", STEPS // 10])
    cfg.merge_from_list(["SOLVER.CHECKPOINT_PERIOD", SAVE, "TEST.EVAL_PERIOD", EVALUATE])
    cfg.merge_from_list(["OUTPUT_DIR", str(output), *SMALL, *options])
    seed_all_rng(cfg.SEED)  # of the first weights
    trainer = DefaultTrainer(cfg)

    def end(trainer):
        with (output / f"images{os.getpid()}.txt").open("a") as file:
            file.write(json.dumps([trainer.iter, trainer._trainer._images]) + "\n")

    trainer.register_hooks([CallbackHook(before_step=kill, after_step=end)])
    trainer.resume_or_load(resume=True)
    trainer.train()


def killed(root, output, options, kills):
    """Train with kills; return what it leaves."""
    for kill in [*kills, None]:
        code = runs.finish(runs.start(train, root, output, options, kill), 3600)
        assert code == (0 if kill is None else -signal.SIGKILL)
    return left(output)


def left(output):
    """Return digests and figures of what a training leaves."""
    final = torch.load(output / "model_final.pth", weights_only=True)
    best = torch.load(output / "model_best.pth", weights_only=True)
    trainer = final["trainer"]
    lines = (output / "metrics.json").read_text().splitlines()
    rows = [{k: v for k, v in json.loads(x).items() if not MEASURED.search(k)} for x in lines]
    return {
        "iteration": final["iteration"],
        "weights": tiny.digest(final["model"]),
        "averaged weights": tiny.digest(load_file(output / "model_final_ema.safetensors")),
        "optimizer": tiny.digest(trainer["_trainer"]["optimizer"]),
        "all state": tiny.final_state(output),
        "best": trainer["hooks"]["BestCheckpointer"],
        "best weights": tiny.digest(best["model"]),
        "best averaged": tiny.digest(load_file(output / "model_best_ema.safetensors")),
        "stopping": trainer["hooks"]["EarlyStopping"],
        "metrics": [row for row in rows if len(row) > 1],
        "images": runs.images(output),
    }


@pytest.fixture(scope="module")
def ward(tmp_path_factory):
    root = tmp_path_factory.mktemp("ward")
    spec = patient_video.WardSpec(stride=60)
    if not LONG:
        spec = patient_video.WardSpec(0, 12, 1, 4.0, width=160, stride=12, train_stride=6)
    patient_video.generate(root / "patient_video", spec, workers=2)
    register(root)
    DatasetCatalog.get(MIXED)  # writes the turned images
    yield root
    for name in (MIXED, patient_video.TRAIN, patient_video.TEST):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.mark.parametrize("ends", ["at the last iteration", "early"])
def test_three_kills_with_every_switch_on(ward, tmp_path, ends):
    options = ("SOLVER.EARLY_STOPPING.PATIENCE", 100)
    evaluation = 3 * EVALUATE - 1
    kills = [Kill("batch", 3 * SAVE), Kill("save", 5 * SAVE - 1)]
    if ends == "early":  # nothing is ever better by 1000
        options = ("SOLVER.EARLY_STOPPING.PATIENCE", 2, "SOLVER.EARLY_STOPPING.MIN_DELTA", 1000.0)
        kills = [Kill("batch", SAVE), Kill("save", 3 * SAVE - 1)]
    kills.append(Kill("evaluation", evaluation))
    begin = time.monotonic()
    with ThreadPoolExecutor() as pool:  # each waits for its processes
        both = [("straight", []), ("run", kills)]
        jobs = [pool.submit(killed, ward, tmp_path / name, options, x) for name, x in both]
        straight, run = (job.result() for job in jobs)
    seconds = f"{time.monotonic() - begin:.0f} s"
    shown = {key: x for key, x in straight.items() if key not in ("metrics", "images")}
    print(f"{STEPS} iterations, ends {ends}, {seconds}: {json.dumps(shown, indent=1)}")
    assert {key for key in straight if straight[key] != run[key]} == set()
    assert straight["iteration"] == (evaluation if ends == "early" else STEPS - 1)
    assert len(straight["images"]) == straight["iteration"] + 1
    assert len([row for row in straight["metrics"] if "bbox/AP" in row]) >= 2
