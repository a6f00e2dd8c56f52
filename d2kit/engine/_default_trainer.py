"""`DefaultTrainer`: training, evaluation and checkpoints of a config."""

import contextlib
import logging
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from d2kit.checkpoint import DetectionCheckpointer
from d2kit.config import CfgNode
from d2kit.engine import _trainer_parts as parts
from d2kit.engine import hooks
from d2kit.engine._accumulation import check_accumulation
from d2kit.engine._class_weights import build_class_weights_cfg
from d2kit.engine._classes import build_named_cfg, default_check_datasets
from d2kit.engine._default_evaluation import DefaultEvaluation
from d2kit.engine._evaluation_pictures import build_evaluation_pictures
from d2kit.engine._failure import guarded_step
from d2kit.engine._hooks_epochs import report_epochs, writing_period
from d2kit.engine._hooks_forecast import TimeForecast
from d2kit.engine._hooks_preemption import add_preemption
from d2kit.engine._hooks_skipped import SkippedImages
from d2kit.engine._preflight import (
    check_classes,
    check_output_dir,
    default_num_classes,
)
from d2kit.engine._preflight_data import number_of_images
from d2kit.engine._preflight_report import build_preflight_report
from d2kit.engine._resume_check import ConfigRecord
from d2kit.engine._run_lock import hold_output_dir, release_output_dir
from d2kit.engine._scaling import build_iterations_cfg, build_scaled_cfg, start_loader_at
from d2kit.engine._setup import create_ddp_model, default_writers
from d2kit.engine._trackers import build_tracker_writers, default_tracker_check
from d2kit.engine._trainer_base import HookBase, TrainerBase
from d2kit.engine._trainers import SimpleTrainer
from d2kit.solver import build_lr_scheduler, build_optimizer
from d2kit.utils import comm
from d2kit.utils.events import EventWriter
from d2kit.utils.logger import setup_logger

__all__ = ["DefaultTrainer"]

logger = logging.getLogger(__name__)


class DefaultTrainer(DefaultEvaluation, TrainerBase):
    """Builds everything a config names and trains it; override a ``build_*`` to change a part.

    Datasets, classes and the output folder are checked before the model is built. A resumed run
    ends with the same weights, bit for bit, as one that was never interrupted.

    Args:
        cfg: the config; copied.

    Attributes:
        model: the model, wrapped for several processes.
        optimizer: its optimizer.
        data_loader: the training loader.
        scheduler: the learning-rate schedule.
        checkpointer: saves and loads.
        cfg: the config used, scaled to the number of processes (`auto_scale_workers`), with the
            seed of the run in ``SEED`` and class weights as numbers.

    Raises:
        KeyError: if a dataset is not registered.
        ValueError: if a dataset is damaged or its classes do not fit the config.
        OSError: if OUTPUT_DIR cannot be written to.

    Example:
        >>> trainer = DefaultTrainer(cfg)  # doctest: +SKIP
        >>> trainer.resume_or_load(resume=True)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        if not logging.getLogger("d2kit").isEnabledFor(logging.INFO):
            setup_logger()  # a script without default_setup
        check_output_dir(cfg.OUTPUT_DIR)
        hold_output_dir(cfg.OUTPUT_DIR)
        default_tracker_check(cfg)
        default_check_datasets(cfg, (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        self.seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        self.cfg = self._with_seed(cfg, self.seed)

        check_accumulation(
            cfg.SOLVER.IMS_PER_BATCH, comm.get_world_size(), cfg.SOLVER.ACCUMULATE_STEPS
        )
        data_loader = self.build_train_loader(self.cfg)
        self.cfg = build_iterations_cfg(self.cfg, number_of_images(data_loader))
        self._test_counts = check_classes(
            default_num_classes(self.cfg), cfg.DATASETS.TRAIN, cfg.DATASETS.TEST
        )
        self.cfg = build_class_weights_cfg(build_named_cfg(self.cfg), data_loader)
        model = self.build_model(self.cfg)
        optimizer = self.build_optimizer(self.cfg, model)
        model = create_ddp_model(model, broadcast_buffers=False)
        self._trainer: SimpleTrainer = parts.build_inner_trainer(
            self.cfg, model, data_loader, optimizer
        )
        self.scheduler = self.build_lr_scheduler(self.cfg, optimizer)
        self.checkpointer = DetectionCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            config=ConfigRecord(self.cfg.dump(), allow=cfg.RESUME_CHANGED),
            trainer=weakref.proxy(self),
        )
        self._last_eval_results: dict[str, Any] = {}
        self.start_iter = 0
        self.max_iter = self.cfg.SOLVER.MAX_ITER
        self.register_hooks(self.build_hooks())

    @staticmethod
    def _with_seed(cfg: CfgNode, seed: int) -> CfgNode:
        """Return a frozen copy of a config with another SEED."""
        cfg = cfg.clone()
        cfg.defrost()
        cfg.SEED = seed
        cfg.freeze()
        return cfg

    # ---- running

    def resume_or_load(self, resume: bool = True) -> None:
        """Continue from the newest intact checkpoint in OUTPUT_DIR, or load MODEL.WEIGHTS.

        Args:
            resume: whether to look for a checkpoint. It restores weights, optimizer, schedule,
                hooks, seed and the place in the stream of training data.
        """
        self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        if self.checkpointer.resumed_from:
            self.start_iter = self.iter + 1
            logger.info(
                "Resuming %s at iteration %d", self.checkpointer.resumed_from, self.start_iter
            )

    def train(self) -> Any:  # type: ignore[override]
        """Train from `start_iter` to `max_iter`.

        Returns:
            The results of the last evaluation, as `test` returns them; empty on other processes
            than rank 0, and where there is no test set.

        Raises:
            SystemExit: if the results are not the expected ones.
        """
        if self.start_iter > 0:
            start_loader_at(self._trainer.data_loader, self.start_iter)
        self.preflight()
        hold_output_dir(self.cfg.OUTPUT_DIR)
        add_preemption(self, self.checkpointer)
        try:
            super().train(self.start_iter, self.max_iter)
        finally:
            release_output_dir(self.cfg.OUTPUT_DIR)
        report_epochs(self, self.cfg.OUTPUT_DIR)
        if len(self.cfg.TEST.EXPECTED_RESULTS) and comm.is_main_process():
            from d2kit.evaluation import verify_results

            verify_results(self.cfg, self._last_eval_results)
        return self._last_eval_results

    def run_step(self) -> None:
        """Do one iteration."""
        self._trainer.iter = self.iter
        self._trainer.max_iter = self.max_iter
        with guarded_step(self):
            self._trainer.run_step()

    def before_train(self) -> None:
        """Call the hooks; evaluate, if a resumed run missed that (TEST.BEST_METRIC)."""
        super().before_train()
        parts.repeat_missed_evaluation(self)

    def after_train(self) -> None:
        """Write what waits, call the hooks, let go of the loader's workers."""
        if self.iter >= self.max_iter:
            self._trainer.flush_metrics()
        self._trainer._data_loader_iter_obj = None
        super().after_train()

    def preflight(self) -> None:
        """Log what is about to be trained (``PREFLIGHT`` in the config); `train` does it first."""
        if comm.is_main_process():
            logger.info("%s", build_preflight_report(self.cfg, self, self._test_counts))

    # ---- state

    def register_hooks(self, hooks: Sequence[HookBase | None]) -> None:
        """Append hooks, see `TrainerBase`; the inner trainer calls their `after_backward`."""
        super().register_hooks(hooks)
        self._trainer._hooks = self._hooks

    def state_dict(self) -> dict[str, Any]:
        """Return iteration, states of the hooks, of the inner trainer, and the seed."""
        inner = self._trainer.state_dict()
        inner = {key: value for key, value in inner.items() if key not in ("iteration", "hooks")}
        state = super().state_dict()
        inner["iteration"] = state["iteration"]
        return {**state, "_trainer": inner, "seed": self.seed}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; another seed rebuilds the training loader."""
        super().load_state_dict(state_dict)
        self._trainer.load_state_dict(state_dict["_trainer"])
        seed = state_dict.get("seed")
        if seed is not None and seed != self.seed:
            logger.info("Going on with seed %d of the checkpoint, not %s", seed, self.seed)
            self.seed = seed
            self.cfg = self._with_seed(self.cfg, seed)
            self._trainer.reset_data_loader(lambda: self.build_train_loader(self.cfg))

    # ---- parts

    @property
    def model(self) -> nn.Module:
        """The model, wrapped for several processes."""
        return self._trainer.model

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer."""
        return self._trainer.optimizer

    @property
    def data_loader(self) -> Any:
        """The training loader."""
        return self._trainer.data_loader

    def build_hooks(self) -> list[HookBase | None]:
        """Return the hooks: timer, schedule, averages, checkpoints, evaluation, writers.

        To add one, extend this method; insert it before the last, which writes.
        """
        cfg = self.cfg
        epochs = parts.build_epochs_hook(cfg, number_of_images(self.data_loader))
        result: list[HookBase | None] = [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=self.scheduler),
            parts.build_averaging_hook(cfg, self.model, self.checkpointer),
            epochs,
            TimeForecast() if comm.is_main_process() else None,
            SkippedImages() if cfg.DATALOADER.MAX_SKIPPED_IMAGES else None,
        ]
        if cfg.TEST.PRECISE_BN.ENABLED:
            result.append(parts.build_precise_bn(cfg, self.model, self.build_train_loader))
        # Before the evaluation: whatever happens there, the weights are safe.
        if comm.is_main_process():
            checkpoint_period = cfg.SOLVER.CHECKPOINT_PERIOD
            result.append(hooks.PeriodicCheckpointer(self.checkpointer, checkpoint_period))
        result += parts.build_evaluation_hooks(cfg, self._evaluate, self.checkpointer, result)
        if comm.is_main_process():
            result.append(hooks.PeriodicWriter(self.build_writers(), writing_period(epochs)))
        return result

    def evaluated_weights(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which `model` has the weights to evaluate, with SOLVER.EMA others."""
        return parts.evaluated_weights(self._hooks)

    def _evaluate(self) -> dict[str, Any]:
        with self.evaluated_weights():
            results = self.test(self.cfg, self.model)
            done = min(self.iter + 1, self.max_iter)
            build_evaluation_pictures(self.cfg, self.model, done, self.build_test_loader)
            self._last_eval_results = parts.build_full_results(self.cfg, self.model, results)
        return self._last_eval_results

    def build_writers(self) -> list[EventWriter]:
        """Return the writers: those of ``WRITERS`` in the config, and the `default_writers`."""
        usual = default_writers(self.cfg.OUTPUT_DIR, self.max_iter)
        return [*build_tracker_writers(self.cfg), *usual]

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Build the model, see `d2kit.modeling.build_model`."""
        import d2kit.data  # noqa: F401 - models ask it for class frequencies (federated loss)
        from d2kit.modeling import build_model

        model = build_model(cfg)
        total = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        logger.info(
            "%s: %.2f M parameters, %.2f M trained",
            type(model).__name__,
            total / 1e6,
            trained / 1e6,
        )
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> Optimizer:
        """Build the optimizer, see `d2kit.solver.build_optimizer`."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: Optimizer) -> LRScheduler:
        """Build the schedule, see `d2kit.solver.build_lr_scheduler`."""
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """Build the training loader, see `d2kit.data.build_detection_train_loader`."""
        from d2kit.data import build_detection_train_loader

        return build_detection_train_loader(cfg)

    @staticmethod
    def auto_scale_workers(cfg: CfgNode, num_workers: int) -> CfgNode:
        """Scale rate, batch and schedule to another batch or number of processes than planned.

        First BASE_LR to the batch of the config, then both and the schedule to the processes.

        Source: the linear scaling rule, Goyal et al. 2017, section 2.1 (arXiv 1706.02677).

        Args:
            cfg: SOLVER.REFERENCE_BATCH is the batch that BASE_LR was written for,
                SOLVER.REFERENCE_WORLD_SIZE the number of processes that batch and schedule were
                written for; 0: leave.
            num_workers: number of processes.

        Returns:
            `cfg` itself, or a scaled copy whose references are what it was scaled to, so that
            nothing is scaled twice.

        Raises:
            ValueError: if the batch does not divide evenly.
        """
        return build_scaled_cfg(cfg, num_workers)
