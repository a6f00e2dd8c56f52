"""Says early how long a training will take."""

import datetime
import logging
import statistics
import time

from d2kit.engine._trainer_base import HookBase

__all__ = ["TimeForecast"]

logger = logging.getLogger(__name__)


class TimeForecast(HookBase):
    """Logs the expected time once, after some iterations.

    Evaluations and checkpoints are not in it: what runs between the iterations is not measured.

    Args:
        steps: iterations to measure.
        warmup: iterations before them, which are slower than the others.
    """

    def __init__(self, steps: int = 20, warmup: int = 3) -> None:
        self._steps = steps
        self._warmup = warmup
        self._times: list[float] = []
        self._start = 0.0

    def before_step(self) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def after_step(self) -> None:
        """Stop it; speak after the last iteration that is measured."""
        done = self.trainer.iter + 1 - self.trainer.start_iter
        if not self._warmup < done <= self._warmup + self._steps:
            return
        self._times.append(time.perf_counter() - self._start)
        left = self.trainer.max_iter - self.trainer.iter - 1
        if len(self._times) < self._steps or left <= 0:
            return
        typical = statistics.median(self._times)
        seconds = round(statistics.mean(self._times) * left)
        end = datetime.datetime.now() + datetime.timedelta(seconds=seconds)
        logger.info(
            "After %d iterations (median %.3f s each): %s for the other %s, evaluations and "
            "checkpoints not counted; done about %s",
            self._steps,
            typical,
            datetime.timedelta(seconds=seconds),
            f"{left:,}",
            end.strftime("%Y-%m-%d %H:%M"),
        )
