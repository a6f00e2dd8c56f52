"""The hook that ends a training that no longer gets better."""

import logging
import math
from collections.abc import Mapping
from typing import Any

from d2kit.engine._trainer_base import HookBase
from d2kit.utils import comm

__all__ = ["EarlyStopping"]

logger = logging.getLogger(__name__)


class EarlyStopping(HookBase):
    """Ends the training when several evaluations in a row have not improved a metric.

    Register it behind the `EvalHook` that produces the metric and before a `BestCheckpointer`,
    on all processes: rank 0, which has the results, decides for all.

    Args:
        eval_period: that of the `EvalHook`, at least 1.
        metric: name in the storage, e.g. ``"bbox/AP"``.
        patience: so many evaluations in a row without a new best value end the training.
        mode: "max" or "min", which of two values is better.
        min_delta: a value must be better than the best by more than this; in the metric's unit.

    Raises:
        ValueError: if a value is out of its range.
    """

    def __init__(
        self,
        eval_period: int,
        metric: str,
        patience: int,
        *,
        mode: str = "max",
        min_delta: float = 0.0,
    ) -> None:
        if mode not in ("max", "min"):
            raise ValueError(f"EarlyStopping: mode must be 'max' or 'min', got '{mode}'")
        if eval_period < 1 or patience < 1 or min_delta < 0:
            raise ValueError(
                "EarlyStopping (SOLVER.EARLY_STOPPING) needs evaluations at intervals "
                "(TEST.EVAL_PERIOD at least 1), a PATIENCE of at least 1 and a MIN_DELTA of at "
                f"least 0, got {eval_period}, {patience} and {min_delta}"
            )
        self._period = eval_period
        self._metric = metric
        self._patience = patience
        self._sign = 1 if mode == "max" else -1
        self._min_delta = min_delta
        self.best: float | None = None
        self.without_gain = 0

    def before_train(self) -> None:
        """End at once, if the resumed run had ended."""
        if self.without_gain >= self._patience:
            self.trainer.max_iter = self.trainer.start_iter

    def after_step(self) -> None:
        """Compare, if an evaluation just happened."""
        done = self.trainer.iter + 1
        if done % self._period or done >= self.trainer.max_iter:
            return
        own = self.trainer.storage.latest().get(self._metric) if comm.is_main_process() else None
        value = comm.all_gather(None if own is None else float(own[0]))[0]
        if value is None:
            logger.warning("No value of '%s' to stop early by", self._metric)
            return
        if math.isfinite(value) and (self.best is None or self._gain(value, self.best)):
            self.best, self.without_gain = value, 0
            return
        self.without_gain += 1
        if self.without_gain >= self._patience:
            logger.info(
                "%s has not improved on %s in %d evaluations: the training ends at iteration %d",
                self._metric,
                self.best,
                self.without_gain,
                self.trainer.iter,
            )
            self.trainer.max_iter = done

    def _gain(self, value: float, best: float) -> bool:
        return self._sign * (value - best) > self._min_delta

    def state_dict(self) -> dict[str, Any]:
        """Return the best value and the number of evaluations since."""
        return {"best": self.best, "without_gain": self.without_gain}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.best = state_dict["best"]
        self.without_gain = state_dict["without_gain"]
