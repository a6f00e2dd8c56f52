"""Train or evaluate what a lazy config describes: the whole loop on one page.

d2kit train-lazy --config-file COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py
d2kit train-lazy --config-file mine.py --trust-config [KEY=VALUE ...]
Go on / evaluate: --resume / --eval-only [train.init_checkpoint=FILE]

The config is a name of the model zoo or a file. A Python file is executed: say that you trust it.
It holds model, optimizer, lr_multiplier, dataloader (train, test, evaluator) and train, as
configs/common/train.py has it.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from d2kit import model_zoo
from d2kit.checkpoint import DetectionCheckpointer
from d2kit.config import LazyConfig, instantiate
from d2kit.data import build_detection_train_loader
from d2kit.engine import (
    AMPTrainer,
    SimpleTrainer,
    check_evaluated_weights,
    create_ddp_model,
    default_argument_parser,
    default_setup,
    default_writers,
    hooks,
    launch,
    user_errors,
)
from d2kit.engine.resolve import choose_precision, start_loader_at
from d2kit.evaluation import inference_on_dataset, print_csv_format
from d2kit.solver import LRMultiplier
from d2kit.utils import comm

logger = logging.getLogger("d2kit.lazy")


def build_model(cfg: Any) -> torch.nn.Module:
    """Return the model on the device of the config, or on the CPU where CUDA is absent."""
    device = str(cfg.train.device)
    if device.startswith("cuda") and not torch.cuda.is_available():
        logger.warning("train.device is %s, but CUDA is not available: using the CPU", device)
        device = "cpu"
    return instantiate(cfg.model).to(device)


def evaluate(cfg: Any, model: torch.nn.Module) -> Mapping[str, Any]:
    """Return the metrics of the test set; empty without `dataloader.evaluator`."""
    if "evaluator" not in cfg.dataloader:
        return {}
    loader, evaluator = (instantiate(cfg.dataloader[name]) for name in ("test", "evaluator"))
    results = inference_on_dataset(model, loader, evaluator)
    if comm.is_main_process():
        print_csv_format(results)
    return results


def build_loader(cfg: Any) -> Any:
    """Return the training loader; d2kit's own draws by the seed of the run."""
    loader = cfg.dataloader.train
    if loader["_target_"] is build_detection_train_loader and "seed" not in loader:
        loader.seed = cfg.train.seed
    return instantiate(loader)


def train(cfg: Any, resume: bool) -> Mapping[str, Any]:
    """Train for `train.max_iter` steps, and return the metrics of the last evaluation."""
    model = build_model(cfg)
    logger.info("Model:\n%s", model)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    loader = build_loader(cfg)
    model = create_ddp_model(model, **cfg.train.ddp)
    precision = None
    if cfg.train.amp.enabled:
        device = next(model.parameters()).device
        precision = choose_precision(cfg.train.amp.get("precision", "float16"), device)
    if precision is None:
        trainer = SimpleTrainer(model, loader, optimizer)
    else:
        trainer = AMPTrainer(model, loader, optimizer, precision=precision)
    trainer.seed = cfg.train.seed
    checkpointer = DetectionCheckpointer(model, cfg.train.output_dir, trainer=trainer)
    schedule = LRMultiplier(optimizer, instantiate(cfg.lr_multiplier), cfg.train.max_iter)
    last: dict[str, Any] = {}

    def test() -> Mapping[str, Any]:
        last.clear()
        last.update(evaluate(cfg, model))
        return last

    main = comm.is_main_process()
    writers = default_writers(cfg.train.output_dir, cfg.train.max_iter) if main else []
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=schedule),
            hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer) if main else None,
            hooks.EvalHook(cfg.train.eval_period, test),
            hooks.PeriodicWriter(writers, period=cfg.train.log_period) if main else None,
            hooks.Preemption(checkpointer),
        ]
    )
    checkpointer.resume_or_load(cfg.train.init_checkpoint or "", resume=resume)
    start = trainer.iter + 1 if checkpointer.resumed_from else 0
    if start:
        start_loader_at(loader, start)
    trainer.train(start, cfg.train.max_iter)
    return last


def run(args: argparse.Namespace, register: Callable[[], None] | None = None) -> Mapping[str, Any]:
    """Train or evaluate in one process, and return the metrics.

    Args:
        args: of `parser`.
        register: makes datasets known by name.
    """
    with user_errors():
        if register is not None:
            register()
        if Path(args.config_file).is_file():
            cfg = LazyConfig.load(args.config_file, trust=args.trust_config)
        else:
            cfg = model_zoo.get_config(args.config_file)
        LazyConfig.apply_overrides(cfg, args.opts)
        default_setup(cfg, args)
        if not args.eval_only:
            return train(cfg, args.resume)
        model = build_model(cfg)
        checkpointer = DetectionCheckpointer(model, cfg.train.output_dir)
        checkpointer.resume_or_load(cfg.train.init_checkpoint or "", resume=args.resume)
        check_evaluated_weights(checkpointer, args.allow_untrained)
        return evaluate(cfg, create_ddp_model(model))


def parser() -> argparse.ArgumentParser:
    """Return the parser of the arguments."""
    found = default_argument_parser(epilog=__doc__)
    found.prog = "d2kit train-lazy"
    found.add_argument(
        "--trust-config", action="store_true", help="execute --config-file, a Python program"
    )
    return found


@user_errors()
def main(argv: list[str] | None = None, register: Callable[[], None] | None = None) -> None:
    """Start the processes that the command line asks for; each calls `run`.

    Args:
        argv: the command line; None: that of the process.
        register: makes datasets known by name, e.g. those of a checkout. Each process calls it.
    """
    args = parser().parse_args(argv)
    launch(
        run,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        num_processes=args.num_processes,
        args=(args, register),
    )
