"""Hooks that average the weights over the iterations, and that save checkpoints."""

from __future__ import annotations

import contextlib
import logging
import math
import operator
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from fvcore.common.checkpoint import Checkpointer
from fvcore.common.checkpoint import PeriodicCheckpointer as FvcorePeriodicCheckpointer
from torch import Tensor, nn

from d2kit.checkpoint.files import oldest_first
from d2kit.engine.trainer_base import HookBase
from d2kit.utils import comm
from d2kit.utils.logger import auxiliary

__all__ = [
    "BestCheckpointer",
    "PeriodicCheckpointer",
    "WeightAveraging",
]


class WeightAveraging(HookBase):
    """Keeps an exponential moving average of a model's weights, to evaluate with.

    After each iteration ``average = d * average + (1 - d) * weights``, of parameters and of
    BatchNorm's statistics; integers are copied. Register it before the hook that saves
    checkpoints, on all processes.

    Source: Polyak and Juditsky 1992; Tarvainen and Valpola 2017, section 2 (arXiv 1703.01780).

    Args:
        model: unwrapped if it is data-parallel.
        decay: d, in [0, 1).
        warmup: use the smaller of `decay` and (1 + t) / (10 + t) after t iterations, so that the
            random initial weights are soon forgotten.
        checkpointer: writes the average as ``<file_prefix>_final_ema.safetensors`` after the last
            iteration; None: nothing is written.
        file_prefix: start of the file name.

    Raises:
        ValueError: if `decay` is not in [0, 1).
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float,
        *,
        warmup: bool = True,
        checkpointer: Checkpointer | None = None,
        file_prefix: str = "model",
    ) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"the decay (SOLVER.EMA.DECAY) must be in [0, 1), got {decay}")
        self._model: nn.Module = comm.unwrap_model(model)
        self._decay = decay
        self._warmup = warmup
        self._checkpointer = checkpointer
        self._file_prefix = file_prefix
        self._average: dict[str, Tensor] = {}
        self._updates = 0

    def before_train(self) -> None:
        """Start from the weights of the model, unless an average was restored."""
        if not self._average:
            self._average = {name: x.clone() for name, x in self._model.state_dict().items()}

    def after_step(self) -> None:
        """Take the weights of this iteration in."""
        decay = self._decay
        if self._warmup:
            decay = min(decay, (1 + self._updates) / (10 + self._updates))
        floats: tuple[list[Tensor], list[Tensor]] = ([], [])
        for name, value in self._model.state_dict().items():
            if value.is_floating_point():
                floats[0].append(self._average[name])
                floats[1].append(value)
            else:
                self._average[name].copy_(value)
        torch._foreach_lerp_(*floats, 1 - decay)
        self._updates += 1

    def after_train(self) -> None:
        """Write the average, unless the training failed."""
        if self.trainer.iter >= self.trainer.max_iter:
            self.save(f"{self._file_prefix}_final_ema")

    def save(self, name: str) -> None:
        """Write the average as ``<name>.safetensors``, which MODEL.WEIGHTS can name."""
        if self._checkpointer is not None:
            with self.averaged():
                self._checkpointer.save(f"{name}.safetensors")

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the average into the model while the context lasts; then its own weights again."""
        own = {name: x.clone() for name, x in self._model.state_dict().items()}
        try:
            self._put(self._average or own)
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, weights: Mapping[str, Tensor]) -> None:
        for name, value in self._model.state_dict().items():
            value.copy_(weights[name])

    def state_dict(self) -> dict[str, Any]:
        """Return the average and the number of iterations in it."""
        return {"average": self._average, "updates": self._updates}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: if it is the average of another model.
        """
        found, own = state_dict["average"], self._model.state_dict()
        wrong = set(found) ^ set(own)
        wrong |= {k for k in set(found) & set(own) if found[k].shape != own[k].shape}
        if wrong:
            raise ValueError(
                "the averaged weights (SOLVER.EMA) of the checkpoint are of another model; "
                f"different: {sorted(wrong)[:5]}"
            )
        self._average = {name: x.to(own[name].device, copy=True) for name, x in found.items()}
        self._updates = state_dict["updates"]


logger = logging.getLogger(__name__)


class PeriodicCheckpointer(FvcorePeriodicCheckpointer, HookBase):
    """Saves ``<prefix>_<iteration>`` at intervals and ``<prefix>_final`` after the last iteration.

    Args:
        checkpointer: saves.
        period: iterations between two saves.
        max_iter: the last iteration; None means the trainer's.
        max_to_keep: keep that many of the numbered files, also those of earlier runs in the same
            folder; None keeps all.
        file_prefix: start of the file names.

    Raises:
        ValueError: if a number is not positive.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        period: int,
        max_iter: int | None = None,
        max_to_keep: int | None = None,
        file_prefix: str = "model",
    ) -> None:
        if int(period) < 1 or (max_to_keep is not None and max_to_keep < 1):
            raise ValueError(
                f"period and max_to_keep must be at least 1, got {period} and {max_to_keep}"
            )
        super().__init__(checkpointer, period, max_iter, max_to_keep, file_prefix)

    max_iter: int | None

    def before_train(self) -> None:
        """Take over the trainer's last iteration, if none was given."""
        self._planned = self.trainer.max_iter
        if self.max_iter is None:
            self.max_iter = self.trainer.max_iter

    def after_train(self) -> None:
        """Save the last state of a training that another hook ended early."""
        if self.trainer.iter >= self.trainer.max_iter < self._planned:
            done = max(self.trainer.max_iter - 1, 0)
            self.checkpointer.save(f"{self.file_prefix}_final", iteration=done)

    def after_step(self) -> None:
        """Save, if it is time."""
        self.step(self.trainer.iter)

    def step(self, iteration: int, **kwargs: object) -> None:
        """Save, if it is time, then delete the oldest files beyond `max_to_keep`.

        Args:
            iteration: index of the iteration just done.
            kwargs: further entries of the checkpoint.
        """
        entries = {"iteration": int(iteration), **kwargs}
        last = self.max_iter is not None and iteration >= self.max_iter - 1
        if (iteration + 1) % self.period == 0:
            self.checkpointer.save(f"{self.file_prefix}_{iteration:07d}", **entries)
            if self.max_to_keep is not None:
                self._delete_oldest(self.max_to_keep)
        if last:
            self.checkpointer.save(f"{self.file_prefix}_final", **entries)

    def _delete_oldest(self, keep: int) -> None:
        """Delete numbered files of this prefix except the newest; found by looking."""
        name = re.compile(re.escape(self.file_prefix) + r"_\d{7,}\.pth")
        files = [Path(path) for path in self.checkpointer.get_all_checkpoint_files()]
        numbered = oldest_first(path for path in files if name.fullmatch(path.name))
        for path in numbered[:-keep]:
            with auxiliary(path):
                path.unlink(missing_ok=True)
        self.recent_checkpoints = [str(path) for path in numbered[-keep:]]


class BestCheckpointer(HookBase):
    """Saves a checkpoint whenever an evaluation's metric is better than ever before.

    Register it after the `EvalHook` that produces the metric.

    Args:
        eval_period: that of the `EvalHook`; 0: only after the last iteration.
        checkpointer: saves.
        val_metric: name in the storage, e.g. ``"bbox/AP50"``.
        mode: "max" or "min", which of two values is better.
        file_prefix: name of the file.
        averaging: also saves its average, as ``<file_prefix>_ema.safetensors``.

    Raises:
        ValueError: if `mode` is another word.
    """

    def __init__(
        self,
        eval_period: int,
        checkpointer: Checkpointer,
        val_metric: str,
        mode: str = "max",
        file_prefix: str = "model_best",
        *,
        averaging: WeightAveraging | None = None,
    ) -> None:
        if mode not in ("max", "min"):
            raise ValueError(f"BestCheckpointer: mode must be 'max' or 'min', got '{mode}'")
        self._period = eval_period
        self._checkpointer = checkpointer
        self._val_metric = val_metric
        self._logger = logger
        self._compare = operator.gt if mode == "max" else operator.lt
        self._file_prefix = file_prefix
        self._averaging = averaging
        self.best_metric: float | None = None
        self.best_iter: int | None = None
        self._seen = -1

    def after_step(self) -> None:
        """Compare and save, if an evaluation just happened."""
        done = self.trainer.iter + 1
        if self._period > 0 and done % self._period == 0 and done != self.trainer.max_iter:
            self._best_checking()

    def after_train(self) -> None:
        """Compare and save after the last evaluation, unless the training failed."""
        if self.trainer.iter >= self.trainer.max_iter:
            self._best_checking()

    def _update_best(self, val: float, iteration: int) -> bool:
        """Take a finite value for the best so far; return whether it was taken.

        Args:
            val: of the metric.
            iteration: of the evaluation.
        """
        if not math.isfinite(val):
            return False
        self.best_metric, self.best_iter = val, iteration
        return True

    def _best_checking(self) -> None:
        """Compare the newest value with the best one, and save; user classes override it."""
        latest = self.trainer.storage.latest().get(self._val_metric)
        if latest is not None and latest[1] == self._seen:
            return  # an evaluation after which the training ended early
        if latest is None:
            known = sorted(name for name in self.trainer.storage.latest() if "/" in name)
            logger.warning(
                "No value of '%s' to choose the best checkpoint by; evaluations wrote %s",
                self._val_metric,
                known,
            )
            return
        value, iteration = float(latest[0]), latest[1]
        self._seen = iteration
        if not math.isfinite(value):
            return
        if self.best_metric is not None and not self._compare(value, self.best_metric):
            logger.info(
                "%s %.5f is not better than %.5f of iteration %s",
                self._val_metric,
                value,
                self.best_metric,
                self.best_iter,
            )
            return
        if not self._update_best(value, iteration):
            return
        # The last iteration done: after the training `trainer.iter` is one more.
        done = min(self.trainer.iter, self.trainer.max_iter - 1)
        if self._averaging is not None:
            self._averaging.save(f"{self._file_prefix}_ema")
        self._checkpointer.save(self._file_prefix, iteration=done)
        path = os.path.join(self._checkpointer.save_dir, self._file_prefix)
        logger.info("Best %s so far: %.5f, saved to %s", self._val_metric, value, path)

    def state_dict(self) -> dict[str, Any]:
        """Return the best value and its iteration."""
        return {"best_metric": self.best_metric, "best_iter": self.best_iter}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the best value and its iteration."""
        self.best_metric = state_dict["best_metric"]
        self.best_iter = state_dict["best_iter"]
