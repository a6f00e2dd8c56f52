"""Hooks that evaluate, and that recompute BatchNorm statistics."""

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from d2kit.engine._trainer_base import HookBase
from d2kit.utils import comm
from d2kit.utils.events import EventStorage

__all__ = ["EvalHook", "PreciseBN"]

logger = logging.getLogger(__name__)


class EvalHook(HookBase):
    """Evaluates at intervals and after the last iteration; all processes must have it.

    Args:
        eval_period: iterations between two evaluations; 0: only at the end.
        eval_function: returns a nested dict of numbers, which are put into the storage as
            ``task/metric``, or None.
        eval_after_train: whether to evaluate after the last iteration.
        remember: keep in the checkpoint when the last evaluation was; `DefaultTrainer` then
            repeats one that a checkpoint just before it does not know of.
    """

    def __init__(
        self,
        eval_period: int,
        eval_function: Callable[[], Mapping[str, Any] | None],
        eval_after_train: bool = True,
        *,
        remember: bool = False,
    ) -> None:
        self._period = eval_period
        self._func: Callable[[], Mapping[str, Any] | None] | None = eval_function
        self._eval_after_train = eval_after_train
        self._remember = remember
        self.evaluated = self._done_here = -1

    def after_step(self) -> None:
        """Evaluate, if it is time; after the last iteration `after_train` does."""
        done = self.trainer.iter + 1
        if self._period > 0 and done % self._period == 0 and done != self.trainer.max_iter:
            self._do_eval()
            self.evaluated = self._done_here = done

    def missed(self, start_iter: int) -> bool:
        """Tell whether a run that resumes at an iteration should have evaluated just before it."""
        due = self._remember and self._period > 0 and start_iter % self._period == 0
        return due and start_iter > 0 and self.evaluated != start_iter

    def after_train(self) -> None:
        """Evaluate, unless the training failed; then forget the function."""
        ended = self.trainer.iter >= self.trainer.max_iter
        if self._eval_after_train and ended and self._done_here != self.trainer.iter:
            self._do_eval()
        self._func = None  # it usually refers to the trainer

    def _do_eval(self) -> None:
        from d2kit.evaluation.testing import flatten_results_dict

        assert self._func is not None
        results = self._func()
        if results:
            if not isinstance(results, Mapping):
                raise TypeError(
                    f"EvalHook: eval_function must return a dict, got {type(results).__name__}"
                )
            flat = flatten_results_dict(results)
            for name, value in flat.items():
                try:
                    flat[name] = float(value)
                except (TypeError, ValueError):
                    raise ValueError(
                        f"EvalHook: results must be a nested dict of numbers, got {name}={value!r}"
                    ) from None
            self.trainer.storage.put_scalars(**flat, smoothing_hint=False)
        comm.synchronize()  # evaluations may take different times

    def state_dict(self) -> dict[str, Any]:
        """Return the number of iterations before the last evaluation, if it is to be kept."""
        return {"evaluated": self.evaluated} if self._remember else {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        if self._remember:
            self.evaluated = state_dict["evaluated"]


class PreciseBN(HookBase):
    """Replaces BatchNorm's running statistics by means over many batches, before evaluations.

    Register it before the `EvalHook`. Source: Wu and Johnson 2021, section 3 (arXiv 2105.07576).

    Args:
        period: iterations between two updates; 0: only after the last iteration.
        model: whose BatchNorm layers in train mode are updated.
        data_loader: yields batches; its own, so that the training's order stays.
        num_iter: number of batches.
    """

    def __init__(
        self, period: int, model: nn.Module, data_loader: Iterable[Any], num_iter: int
    ) -> None:
        from fvcore.nn.precise_bn import get_bn_modules

        self._period = period
        self._model = model
        self._data_loader = data_loader
        self._num_iter = num_iter
        self._disabled = not get_bn_modules(model)
        if self._disabled:
            logger.info("PreciseBN does nothing: the model has no BatchNorm in train mode")
        self._data_iter: Iterator[Any] | None = None

    def after_step(self) -> None:
        """Update, if it is time."""
        done = self.trainer.iter + 1
        last = done == self.trainer.max_iter
        if last or (self._period > 0 and done % self._period == 0):
            self.update_stats()

    def update_stats(self) -> None:
        """Run `num_iter` batches through the model and set the statistics."""
        if self._disabled:
            return
        from fvcore.nn.precise_bn import update_bn_stats

        if self._data_iter is None:
            self._data_iter = iter(self._data_loader)
        logger.info("PreciseBN: statistics from %d batches", self._num_iter)
        batches = itertools.islice(self._data_iter, self._num_iter)
        with EventStorage():  # what the model puts here is not about the training
            update_bn_stats(self._model, batches, self._num_iter)
