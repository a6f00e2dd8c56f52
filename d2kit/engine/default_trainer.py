"""`DefaultTrainer`: training, evaluation and checkpoints of a config."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fvcore.common.checkpoint import Checkpointer
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from d2kit.checkpoint import DetectionCheckpointer
from d2kit.checkpoint.files import set_aside
from d2kit.config import CfgNode
from d2kit.engine import hooks
from d2kit.engine.evaluate import DefaultEvaluation
from d2kit.engine.hooks.checkpoint import BestCheckpointer, WeightAveraging
from d2kit.engine.hooks.evaluation import (
    EarlyStopping,
    EvalHook,
    PreciseBN,
    draw_evaluation_pictures,
)
from d2kit.engine.hooks.progress import (
    EpochLoss,
    PeriodicWriter,
    SkippedImages,
    TimeForecast,
    report_epochs,
    writing_period,
)
from d2kit.engine.preflight.data import (
    DatasetCounts,
    check_classes,
    check_output_dir,
    number_of_classes,
    number_of_images,
    records_of,
    uses_default_mapper,
)
from d2kit.engine.preflight.records import DefaultRecordCheck
from d2kit.engine.resolve import (
    build_run,
    build_scaled_cfg,
    register_listed_datasets,
    start_loader_at,
)
from d2kit.engine.safety.failure import guarded_step
from d2kit.engine.safety.run_lock import ConfigRecord, hold_output_dir, release_output_dir
from d2kit.engine.safety.stopping import add_preemption
from d2kit.engine.setup import (
    build_tracker_writers,
    check_deterministic,
    check_tracking_services,
    create_ddp_model,
    default_writers,
)
from d2kit.engine.trainer_base import HookBase, TrainerBase
from d2kit.engine.trainers import AMPTrainer, SimpleTrainer, amp_precision
from d2kit.solver import build_lr_scheduler, build_optimizer
from d2kit.utils import comm
from d2kit.utils.devices import use_device
from d2kit.utils.events import EventWriter
from d2kit.utils.logger import auxiliary, setup_logger

logger = logging.getLogger(__name__)


def build_averaging_hook(
    cfg: CfgNode, model: nn.Module, checkpointer: Checkpointer
) -> WeightAveraging | None:
    """Return the hook of SOLVER.EMA; None where that is off."""
    ema = cfg.SOLVER.EMA
    if not ema.ENABLED:
        return None
    return WeightAveraging(model, ema.DECAY, warmup=ema.WARMUP, checkpointer=checkpointer)


def build_epochs_hook(cfg: CfgNode, images: int | None) -> EpochLoss | None:
    """Return the hook that tells the loss of each epoch; None on other processes than rank 0.

    Args:
        cfg: a full config; without a key in epochs there is no such hook.
        images: in one pass over the training set.
    """
    in_epochs = cfg.SOLVER.MAX_EPOCHS or cfg.TEST.EVAL_EPOCHS
    if not (in_epochs and images and comm.is_main_process()):
        return None
    return EpochLoss(images / cfg.SOLVER.IMS_PER_BATCH)


def build_inner_trainer(
    cfg: CfgNode, model: nn.Module, data_loader: Iterable[Any], optimizer: Optimizer
) -> SimpleTrainer:
    """Return what does one iteration: with mixed precision or not, of a batch in parts or whole."""
    steps = cfg.SOLVER.ACCUMULATE_STEPS
    if not cfg.SOLVER.AMP.ENABLED:
        return SimpleTrainer(model, data_loader, optimizer, accumulate_steps=steps)
    precision = amp_precision(cfg.SOLVER.AMP.PRECISION)
    return AMPTrainer(model, data_loader, optimizer, precision=precision, accumulate_steps=steps)


def better_mode(metric: str) -> str:
    """Return "min" for a loss and "max" for any other metric."""
    return "min" if "loss" in metric.lower() else "max"


def build_evaluation_hooks(
    cfg: CfgNode,
    evaluate: Callable[[], Mapping[str, Any] | None],
    checkpointer: Checkpointer,
    others: Iterable[HookBase | None],
) -> list[HookBase | None]:
    """Return the hooks that evaluate, end the training early, and keep the best checkpoint.

    Args:
        cfg: a full config.
        evaluate: what `EvalHook` calls.
        checkpointer: saves the best checkpoint, on rank 0.
        others: the hooks before them.
    """
    period, best, stop = cfg.TEST.EVAL_PERIOD, cfg.TEST.BEST_METRIC, cfg.SOLVER.EARLY_STOPPING
    found: list[HookBase | None] = [
        EvalHook(period, evaluate, remember=True)  # its line belongs into metrics.json
    ]
    if stop.PATIENCE:
        mode = better_mode(stop.METRIC)
        hook = EarlyStopping(
            period, stop.METRIC, stop.PATIENCE, mode=mode, min_delta=stop.MIN_DELTA
        )
        found.append(hook)
    if best and comm.is_main_process():
        averaging = next((hook for hook in others if isinstance(hook, WeightAveraging)), None)
        mode = better_mode(best)
        found.append(BestCheckpointer(period, checkpointer, best, mode, averaging=averaging))
    return found


def full_results(cfg: CfgNode, model: nn.Module, results: dict[str, Any]) -> dict[str, Any]:
    """Return the results of an evaluation, with TEST.VALIDATION_LOSS also the losses.

    Args:
        cfg: a full config.
        model: with the weights that were evaluated.
        results: as of `DefaultTrainer.test`; the losses are added as task ``validation``.
    """
    if not cfg.TEST.VALIDATION_LOSS:
        return results
    from d2kit.engine.evaluate import build_validation_loader, validation_losses

    names = cfg.DATASETS.TEST
    for name in names:
        losses = validation_losses(model, build_validation_loader(cfg, name))
        if comm.is_main_process():
            values = ", ".join(f"{key} {value:.5g}" for key, value in losses.items())
            logger.info("Losses on %s: %s", name, values)
            place = results if len(names) == 1 else results.setdefault(name, {})
            place["validation"] = losses
    return results


def repeat_missed_evaluation(trainer: TrainerBase) -> None:
    """Evaluate as after the iteration before the first, if the checkpoint does not know of it.

    A checkpoint is saved before the evaluation of its iteration, so that it is safe whatever
    happens there; a run resumed from it would otherwise lack a metric to choose and stop by, and a
    line of ``metrics.json``.
    """
    kinds = (EvalHook, EarlyStopping, BestCheckpointer)
    chosen = [hook for hook in trainer._hooks if isinstance(hook, kinds)]
    start = trainer.start_iter
    if start == 0:
        return
    trainer.iter = trainer.storage.iter = start - 1
    if start < trainer.max_iter and any(
        isinstance(hook, EvalHook) and hook.missed(start) for hook in chosen
    ):
        for hook in chosen:
            hook.after_step()
    for writer in trainer._hooks:
        if isinstance(writer, PeriodicWriter):
            writer.make_up()
    trainer.iter = trainer.storage.iter = start


def build_precise_bn(
    cfg: CfgNode, model: nn.Module, build_train_loader: Callable[[CfgNode], Iterable[Any]]
) -> PreciseBN:
    """Return the hook of TEST.PRECISE_BN, with a training loader of its own."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATALOADER.NUM_WORKERS = 0
    loader = build_train_loader(cfg)
    return PreciseBN(cfg.TEST.EVAL_PERIOD, model, loader, cfg.TEST.PRECISE_BN.NUM_ITER)


def evaluated_weights(hooks: Iterable[HookBase]) -> contextlib.AbstractContextManager[None]:
    """Return a context in which the model has the average of the weights, if a hook keeps one."""
    averaging = next((hook for hook in hooks if isinstance(hook, WeightAveraging)), None)
    return averaging.averaged() if averaging else contextlib.nullcontext()


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
        cfg: the config of the run (`d2kit.engine.resolve`): scaled to the number of processes
            (`auto_scale_workers`), with seed, class names, class weights as numbers, iterations
            for epochs, and a device and precision that the machine has.

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
        from d2kit.data.datasets.coco import prefer_class_order

        super().__init__()
        if not logging.getLogger("d2kit").isEnabledFor(logging.INFO):
            setup_logger()  # a script without default_setup
        check_output_dir(cfg.OUTPUT_DIR)
        hold_output_dir(cfg.OUTPUT_DIR)
        check_tracking_services(cfg)
        register_listed_datasets(cfg, (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
        for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST) if cfg.MODEL.CLASS_NAMES else ():
            prefer_class_order(name, cfg.MODEL.CLASS_NAMES)
        run = build_run(
            cfg,
            scale=self.auto_scale_workers,
            build_loader=self.build_train_loader,
            check_datasets=self._check_datasets,
        )
        self.cfg, self.seed, data_loader = run.cfg, run.cfg.SEED, run.loader
        self._test_counts = run.test_counts
        model = self.build_model(self.cfg)
        use_device(next(model.parameters()).device)
        check_deterministic(model)
        optimizer = self.build_optimizer(self.cfg, model)
        model = create_ddp_model(model, broadcast_buffers=False)
        self._trainer: SimpleTrainer = build_inner_trainer(self.cfg, model, data_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(self.cfg, optimizer)
        self.checkpointer = DetectionCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            config=ConfigRecord(self.cfg.dump(), allow=cfg.RESUME_CHANGED),
            trainer=weakref.proxy(self),
        )
        self._last_eval_results: dict[str, Any] = {}
        self._has_trained = False
        self.start_iter = 0
        self.max_iter = self.cfg.SOLVER.MAX_ITER
        self.register_hooks(self.build_hooks())

    def _check_datasets(self, cfg: CfgNode, loader: object) -> dict[str, DatasetCounts | None]:
        """Refuse what mapper, model or evaluator would; keep warnings and counts for the report."""
        # The reports are loaded where they are made: 10 ms of `import d2kit.engine`.
        from d2kit.engine.preflight.report import schedule_warnings

        names = cfg.DATASETS
        classes = number_of_classes(cfg)
        found = DefaultRecordCheck(cfg)
        records = records_of(loader)
        if records is not None and uses_default_mapper(loader):
            found.look_at_training(", ".join(names.TRAIN), records, classes)
            found.look_at_files(", ".join(names.TRAIN), records)
        own = getattr(type(self).build_evaluator, "__func__", None)
        known = own is getattr(DefaultEvaluation.build_evaluator, "__func__", None)
        own = getattr(type(self).build_test_loader, "__func__", None)
        mapped = own is getattr(DefaultEvaluation.build_test_loader, "__func__", None)

        def look(name: str, records: list[Any]) -> None:
            if known:
                found.look_at_test(name, records)
            if mapped:
                found.look_at_files(name, records)

        counts = check_classes(classes, names.TRAIN, names.TEST, look)
        found.raise_if_any()
        self._warnings = [*found.warnings, *schedule_warnings(cfg, cfg.SOLVER.MAX_ITER)]
        if comm.is_main_process():
            for line in self._warnings:
                logger.warning("%s", line)
        return counts

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
            RuntimeError: if this trainer has trained before.
            SystemExit: if the results are not the expected ones.
        """
        if self._has_trained:
            raise RuntimeError(
                f"this trainer has done its training ({self.max_iter} iterations); to train on, "
                "raise SOLVER.MAX_ITER, build a new trainer and call resume_or_load(resume=True); "
                "to begin anew, build a new trainer with another OUTPUT_DIR"
            )
        if self.start_iter > 0:
            start_loader_at(self._trainer.data_loader, self.start_iter)
        self.preflight()
        hold_output_dir(self.cfg.OUTPUT_DIR)
        if self.start_iter == 0 and comm.is_main_process():
            set_aside(Path(self.cfg.OUTPUT_DIR), self.cfg.MODEL.WEIGHTS)
        add_preemption(self, self.checkpointer)
        try:
            super().train(self.start_iter, self.max_iter)
            self._has_trained = True
        finally:
            release_output_dir(self.cfg.OUTPUT_DIR)
        with auxiliary("the report of the epochs"):
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
        """Call the hooks; evaluate and write what a resumed run missed."""
        super().before_train()
        repeat_missed_evaluation(self)

    def after_train(self) -> None:
        """Write what waits, call the hooks, let go of the loader's workers."""
        if self.iter >= self.max_iter:
            self._trainer.flush_metrics()
        self._trainer._data_loader_iter_obj = None
        super().after_train()

    def preflight(self) -> None:
        """Log what is about to be trained (``PREFLIGHT`` in the config); `train` does it first."""
        from d2kit.engine.preflight.report import preflight_report

        if comm.is_main_process():
            logger.info("%s", preflight_report(self.cfg, self, self._test_counts, self._warnings))

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
        epochs = build_epochs_hook(cfg, number_of_images(self.data_loader))
        result: list[HookBase | None] = [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=self.scheduler),
            build_averaging_hook(cfg, self.model, self.checkpointer),
            epochs,
            TimeForecast() if comm.is_main_process() else None,
            SkippedImages() if cfg.DATALOADER.MAX_SKIPPED_IMAGES else None,
        ]
        if cfg.TEST.PRECISE_BN.ENABLED:
            result.append(build_precise_bn(cfg, self.model, self.build_train_loader))
        # Before the evaluation: whatever happens there, the weights are safe.
        if comm.is_main_process():
            checkpoint_period = cfg.SOLVER.CHECKPOINT_PERIOD
            result.append(hooks.PeriodicCheckpointer(self.checkpointer, checkpoint_period))
        result += build_evaluation_hooks(cfg, self._evaluate, self.checkpointer, result)
        if comm.is_main_process():
            result.append(hooks.PeriodicWriter(self.build_writers(), writing_period(epochs)))
        return result

    def evaluated_weights(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which `model` has the weights to evaluate, with SOLVER.EMA others."""
        return evaluated_weights(self._hooks)

    def _evaluate(self) -> dict[str, Any]:
        with self.evaluated_weights():
            results = self.test(self.cfg, self.model)
            done = min(self.iter + 1, self.max_iter)
            with auxiliary("pictures of the evaluation (TEST.VIS_IMAGES)"):
                draw_evaluation_pictures(self.cfg, self.model, done, self.build_test_loader)
            self._last_eval_results = full_results(self.cfg, self.model, results)
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
    def build_train_loader(cls, cfg: CfgNode) -> Iterable[Any]:
        """Build the training loader, see `d2kit.data.build_detection_train_loader`."""
        from d2kit.data import build_detection_train_loader

        loader: Iterable[Any] = build_detection_train_loader(cfg)
        return loader

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
