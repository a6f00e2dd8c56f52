"""Train or evaluate a model from a YAML config.

One process:      d2kit train --config-file X.yaml [KEY VALUE ...]
Several GPUs:     d2kit train --num-gpus 8 --config-file ...
CPU processes:    d2kit train --num-processes 2 --config-file ... MODEL.DEVICE cpu
torchrun:         torchrun --nproc-per-node 8 -m d2kit train --config-file ...
Go on / evaluate: --resume / --eval-only [MODEL.WEIGHTS file]
An export:        --eval-only --config-file exported/
Look first:       --dry-run checks everything, prints what would be trained, and stops
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from d2kit.checkpoint import DetectionCheckpointer
from d2kit.config import CfgNode
from d2kit.engine import (
    DefaultTrainer,
    HookBase,
    check_evaluated_weights,
    default_argument_parser,
    default_setup,
    launch,
    user_errors,
)
from d2kit.engine.hooks import EvalHook
from d2kit.engine.hooks.evaluation import ReportHook
from d2kit.evaluation import verify_results
from d2kit.export.backends import build_exported, is_exported, read_config
from d2kit.utils import comm


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

    def _evaluate_with_tta(self) -> dict:
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
    cfg.freeze()
    default_setup(cfg, args)
    return cfg


def argument_parser() -> argparse.ArgumentParser:
    """Return the parser of training scripts, with ``--dry-run``."""
    parser = default_argument_parser(epilog=__doc__)
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
def main(argv: list[str] | None = None, register: Callable[[], None] | None = None) -> None:
    """Start the processes that the command line asks for; each calls `run`.

    Args:
        argv: the command line; None: that of the process.
        register: makes datasets known by name, e.g. those of a checkout. Each process calls it.
    """
    args = argument_parser().parse_args(argv)
    launch(
        run,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        num_processes=args.num_processes,
        args=(args, register),
    )
