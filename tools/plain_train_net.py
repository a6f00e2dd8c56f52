#!/usr/bin/env python3
"""Train and evaluate without the trainer: the whole loop on one page, to read and to change.

plain_train_net.py --config-file configs/X.yaml [--resume] [--eval-only] [KEY VALUE ...]

Mixed precision (SOLVER.AMP) and periodic evaluation are left to the trainer.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections import OrderedDict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import project
from d2kit.checkpoint import DetectionCheckpointer, PeriodicCheckpointer
from d2kit.config import CfgNode, get_cfg
from d2kit.data import build_detection_test_loader, build_detection_train_loader
from d2kit.engine import (
    check_evaluated_weights,
    create_ddp_model,
    default_argument_parser,
    default_setup,
    default_writers,
    launch,
    user_errors,
)
from d2kit.engine.resolve import build_named_cfg
from d2kit.evaluation import COCOEvaluator, inference_on_dataset, print_csv_format
from d2kit.modeling import build_model
from d2kit.solver import build_lr_scheduler, build_optimizer
from d2kit.utils import comm
from d2kit.utils.env import derive_seed
from d2kit.utils.events import EventStorage

logger = logging.getLogger("d2kit.plain")


def evaluate(cfg: CfgNode, model: torch.nn.Module) -> OrderedDict:
    """Return the metrics of every test set."""
    results = OrderedDict()
    for name in cfg.DATASETS.TEST:
        loader = build_detection_test_loader(cfg, name)
        evaluator = COCOEvaluator(name, output_dir=f"{cfg.OUTPUT_DIR}/inference/{name}")
        results[name] = inference_on_dataset(model, loader, evaluator)
        if comm.is_main_process():
            logger.info("results on %s:", name)
            print_csv_format(results[name])
    return next(iter(results.values())) if len(results) == 1 else results


def reduced_losses(losses: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return the losses averaged over the processes; FloatingPointError where one is not finite."""
    reduced = {k: v.item() for k, v in comm.reduce_dict(losses).items()}
    total = torch.tensor(sum(reduced.values()) if comm.is_main_process() else 0.0)
    if comm.get_world_size() > 1:
        torch.distributed.broadcast(total, 0)
    if not torch.isfinite(total):
        raise FloatingPointError(f"a loss is not finite: {reduced}")
    return reduced


def train(cfg: CfgNode, model: torch.nn.Module, resume: bool) -> None:
    """Train `model` for ``SOLVER.MAX_ITER`` steps."""
    if cfg.SOLVER.MAX_EPOCHS:
        raise ValueError("SOLVER.MAX_EPOCHS: this script counts in SOLVER.MAX_ITER iterations")
    model.train()
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    checkpointer = DetectionCheckpointer(
        model, cfg.OUTPUT_DIR, optimizer=optimizer, scheduler=scheduler
    )
    state = checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    start = state.get("iteration", -1) + 1
    periodic = PeriodicCheckpointer(checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.MAX_ITER)
    writers = default_writers(cfg.OUTPUT_DIR, cfg.SOLVER.MAX_ITER) if comm.is_main_process() else []
    seed = max(cfg.SEED, 0)
    # Batch k is a function of (seed, k): going on at `start` needs no replay of what came before.
    loader = build_detection_train_loader(cfg, start_batch=start, seed=seed)
    build_named_cfg(cfg)  # writes the names of the classes into the run's config.yaml
    logger.info("starting at iteration %d", start)
    with EventStorage(start) as storage:
        before = time.perf_counter()
        for iteration, batch in zip(range(start, cfg.SOLVER.MAX_ITER), loader, strict=False):
            storage.put_scalar("data_time", time.perf_counter() - before)
            torch.manual_seed(derive_seed(seed, iteration, comm.get_rank()))
            losses = model(batch)
            reduced = reduced_losses(losses)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            storage.put_scalars(total_loss=sum(reduced.values()), **reduced)
            storage.put_scalar("lr", optimizer.param_groups[0]["lr"], smoothing_hint=False)
            scheduler.step()
            storage.put_scalar("time", time.perf_counter() - before)
            before = time.perf_counter()
            if iteration % 20 == 19 or iteration + 1 == cfg.SOLVER.MAX_ITER:
                for writer in writers:
                    writer.write()
            periodic.step(iteration)
            storage.step()
        for writer in writers:
            writer.close()


def main(args: argparse.Namespace) -> OrderedDict:
    """Train, then evaluate."""
    with user_errors():
        project.register_all()
        cfg = get_cfg()
        cfg.merge_from_file(args.config_file)
        cfg.merge_from_list(args.opts)
        cfg.freeze()
        default_setup(cfg, args)
        model = build_model(cfg)
        if args.eval_only:
            checkpointer = DetectionCheckpointer(model, cfg.OUTPUT_DIR)
            checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
            check_evaluated_weights(checkpointer, args.allow_untrained)
        else:
            train(cfg, create_ddp_model(model), args.resume)
        return evaluate(cfg, model)


if __name__ == "__main__":
    arguments = default_argument_parser(epilog=__doc__).parse_args()
    launch(
        main,
        arguments.num_gpus,
        num_machines=arguments.num_machines,
        machine_rank=arguments.machine_rank,
        dist_url=arguments.dist_url,
        num_processes=arguments.num_processes,
        args=(arguments,),
    )
