"""``make demo``: generate the ward, train, evaluate, draw, follow a held-out video."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np

from d2kit.cli.train import LITE, Trainer, best_base, seconds_per_iteration
from d2kit.config import CfgNode, get_cfg
from d2kit.engine import DefaultPredictor, default_setup, user_errors
from d2kit.utils.file_io import atomic_write
from project import patient_video, register_all
from project.datasets_root import datasets_root
from project.patient_video.track_demo import track_and_report

CONFIG = Path(__file__).parents[2] / "configs/PatientVideo/mask_rcnn_R_18_FPN_demo.yaml"
SHORTER = CONFIG.with_name("mask_rcnn_lite0_FPN_demo.yaml")
QUICK = patient_video.WardSpec(train_videos=8, test_videos=2, seconds=6.0)
TRAINING_SECONDS = 480.0
"""Of the 12 minutes of `make demo`; installation, evaluation, pictures and video take the rest."""


def train(opts: list[str]) -> tuple[CfgNode, OrderedDict]:
    """Train the recipe that this machine has time for; return config and held-out metrics."""
    file = fitting_recipe(opts)
    cfg = _config(file, opts)
    cfg.freeze()
    args = argparse.Namespace(config_file=str(file), opts=opts, eval_only=False, resume=False)
    default_setup(cfg, args)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    return cfg, trainer.train()


def _config(file: Path, opts: list[str]) -> CfgNode:
    import torch

    cfg = get_cfg()
    cfg.merge_from_file(str(file))
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    cfg.merge_from_list(opts)
    return cfg


def fitting_recipe(opts: list[str], limit: float = TRAINING_SECONDS) -> Path:
    """Return the config to train: where the one from scratch takes too long, the shorter one.

    The speed is measured in a few iterations, and the choice is printed.

    Args:
        opts: KEY, VALUE, ... of the config.
        limit: seconds that the training may take.
    """
    cfg = _config(CONFIG, opts)
    size = (cfg.INPUT.MIN_SIZE_TRAIN[0], cfg.INPUT.MAX_SIZE_TRAIN)
    seconds = seconds_per_iteration(cfg, size)
    needed = cfg.SOLVER.MAX_ITER * seconds
    told = f"Speed: {seconds:.2f} s an iteration, {cfg.SOLVER.MAX_ITER} take {needed / 60:.1f} min"
    base, why = best_base()
    if needed <= limit or base != LITE:
        print(f"{told}: {CONFIG.name}{f' ({why})' if needed > limit else ''}", flush=True)
        return CONFIG
    print(f"{told}, the demo has {limit / 60:.0f}: the shorter recipe, {SHORTER.name}", flush=True)
    return SHORTER


def draw(cfg: CfgNode, count: int = 12) -> Path:
    """Draw truth (left) and prediction (right) of some held-out frames; return the contact sheet.

    Args:
        cfg: the trained experiment; ``model_final.pth`` is read from its output folder.
        count: number of frames, spread evenly over the test set.
    """
    import cv2

    from d2kit.data import DatasetCatalog, MetadataCatalog
    from d2kit.data.detection_utils import read_image
    from d2kit.visualization import ColorMode, Visualizer

    out = Path(cfg.OUTPUT_DIR)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = str(out / "model_final.pth")
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.5
    predictor = DefaultPredictor(cfg)
    metadata = MetadataCatalog.get(patient_video.TEST)
    records = DatasetCatalog.get(patient_video.TEST)
    pairs = []
    (out / "overlays").mkdir(exist_ok=True)
    for i in np.linspace(0, len(records) - 1, count).round().astype(int):
        bgr = read_image(records[i]["file_name"], "BGR")
        found = predictor(bgr)["instances"].to("cpu")
        style = {"scale": 2.0, "instance_mode": ColorMode.SEGMENTATION}
        truth = Visualizer(bgr[..., ::-1], metadata, **style).draw_dataset_dict(records[i])
        guess = Visualizer(bgr[..., ::-1], metadata, **style).draw_instance_predictions(found)
        sides = (captioned(truth.get_image(), "truth"), captioned(guess.get_image(), "model"))
        pairs.append(np.hstack(sides))
        name = Path(records[i]["file_name"])
        file = out / "overlays" / f"{name.parent.name}_{name.stem}.jpg"
        cv2.imwrite(str(file), pairs[-1][..., ::-1])
    rows = [np.hstack(pairs[i : i + 2]) for i in range(0, len(pairs) - 1, 2)]
    sheet = cv2.resize(np.vstack(rows), None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    cv2.imwrite(str(out / "contact_sheet.jpg"), sheet[..., ::-1])
    return out / "contact_sheet.jpg"


def captioned(rgb: np.ndarray, text: str) -> np.ndarray:
    """Return a copy of an overlay with a caption in its lower left corner and a white edge.

    Args:
        rgb: (H, W, 3) uint8.
        text: a word.
    """
    import cv2

    picture = np.ascontiguousarray(rgb)
    place, font = (14, picture.shape[0] - 16), cv2.FONT_HERSHEY_SIMPLEX
    for color, width in (((0, 0, 0), 6), ((255, 255, 255), 2)):
        cv2.putText(picture, text, place, font, 0.9, color, width, cv2.LINE_AA)
    return cv2.copyMakeBorder(picture, 2, 2, 2, 2, cv2.BORDER_CONSTANT, value=(255, 255, 255))


def report(cfg: CfgNode, results: OrderedDict, seconds: dict[str, float]) -> str:
    """Return the closing table, and write it to ``results.json`` and ``results.md``."""
    from tabulate import tabulate

    names = patient_video.CLASS_NAMES
    columns = ["AP", "AP50", "AP75", *(f"AP-{name}" for name in names)]
    rows = [[task, *(values[c] for c in columns)] for task, values in results.items()]
    table = tabulate(rows, ["held-out", *columns], floatfmt=".1f", tablefmt="github")
    times = ", ".join(f"{step} {value:.0f} s" for step, value in seconds.items())
    out = Path(cfg.OUTPUT_DIR)
    plain = {  # JSON knows no NaN, which is the AP of a size or class without ground truth
        task: {name: value if math.isfinite(value) else None for name, value in values.items()}
        for task, values in results.items()
    }
    with atomic_write(out / "results.json", "w") as f:
        json.dump({"results": plain, "seconds": seconds}, f, indent=1, allow_nan=False)
    text = f"{table}\n\nTime: {times}.\n"
    with atomic_write(out / "results.md", "w") as f:
        f.write(text)
    return text


def main() -> None:
    """Run the demo; KEY VALUE pairs on the command line change its config."""
    from d2kit.visualization.plots import plot_losses

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="10 short videos: to see that each step runs here"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs")
    args = parser.parse_args()
    seconds: dict[str, float] = {}
    with user_errors():
        register_all()
        start = time.perf_counter()
        patient_video.generate(datasets_root() / "patient_video", QUICK if args.quick else None)
        seconds["data"] = time.perf_counter() - start
        start = time.perf_counter()
        cfg, results = train(args.opts)
        seconds["training and evaluation"] = time.perf_counter() - start
        start = time.perf_counter()
        sheet = draw(cfg)
        losses = Path(cfg.OUTPUT_DIR) / "losses.png"
        plot_losses(Path(cfg.OUTPUT_DIR) / "metrics.json", losses)
        seconds["pictures"] = time.perf_counter() - start
        start = time.perf_counter()
        out = Path(cfg.OUTPUT_DIR)
        data = datasets_root() / "patient_video"
        followed = track_and_report(cfg, out / "model_final.pth", data, out / "tracked")
        seconds["video"] = time.perf_counter() - start
        print(f"\n{report(cfg, results, seconds)}\n{followed}\n")
    print(f"The video, followed: {out / 'tracked' / 'annotated.mp4'}, motion.png, report.json")
    print(f"Pictures (left: truth, right: prediction): {sheet}\nLosses and AP: {losses}")
    if (out / "report.html").is_file():
        print(f"Results page: {out / 'report.html'}")


if __name__ == "__main__":
    main()
