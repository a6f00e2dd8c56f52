"""Says at the end which damaged images a training has skipped."""

import logging

from d2kit.engine._trainer_base import HookBase
from d2kit.utils import comm

__all__ = ["SkippedImages"]

logger = logging.getLogger(__name__)


class SkippedImages(HookBase):
    """Lists the damaged images that were skipped since the training began or was resumed.

    All processes have this hook. Where the training did not come to its end each of them speaks
    for itself, because the others may be elsewhere.
    """

    def after_train(self) -> None:
        """Write the list."""
        skipped: list[str] = getattr(self.trainer.data_loader, "skipped", list)()
        if self.trainer.iter >= self.trainer.max_iter:
            everywhere = comm.gather(skipped)
            skipped = sorted({name for names in everywhere for name in names})
        if skipped:
            logger.warning(
                "%d damaged images were skipped:\n  %s", len(skipped), "\n  ".join(skipped)
            )
