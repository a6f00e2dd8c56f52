"""`ReportHook`: the results page of a training, when it ends."""

import logging

from d2kit.engine.trainer_base import HookBase

__all__ = ["ReportHook"]

logger = logging.getLogger(__name__)


class ReportHook(HookBase):
    """Writes ``report.html`` and ``README.md`` after the last iteration; never ends a training.

    Only the main process needs it; it belongs behind the hook that writes ``metrics.json``.

    Args:
        output_dir: folder of the run.
    """

    def __init__(self, output_dir: str) -> None:
        self._output_dir = output_dir

    def after_train(self) -> None:
        """Write the page, unless the training ended early; a failure is a warning."""
        if self.trainer.iter < self.trainer.max_iter:
            return
        from d2kit.evaluation.report import write_report

        try:
            logger.info("Results page: %s", write_report(self._output_dir))
        except Exception as error:  # weights and results are there: the page can be made again
            logger.warning(
                "No results page: %s. The training is complete; to try again: d2kit report %s",
                error,
                self._output_dir,
            )
