"""What a training whose schedule is in epochs says of each epoch."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from d2kit.engine._trainer_base import HookBase, TrainerBase

__all__ = ["EpochLoss", "report_epochs"]

logger = logging.getLogger(__name__)


class EpochLoss(HookBase):
    """Puts the mean of the losses of each epoch into the storage, as ``epoch/total_loss``.

    Epoch e ends after iteration round(e x `per_epoch`); the last one may be a part. A resumed run
    goes on with the sum that the checkpoint holds, if this hook runs before the one that saves.

    Args:
        per_epoch: iterations in one pass over the training set, above 0.
    """

    def __init__(self, per_epoch: float) -> None:
        self.per_epoch = per_epoch
        self._sum, self._count = 0.0, 0

    def after_step(self) -> None:
        """Add the loss of this iteration; write the mean at the end of an epoch."""
        found = self.trainer.storage.latest().get("total_loss")
        if found is not None and found[1] == self.trainer.iter:
            self._sum, self._count = self._sum + found[0], self._count + 1
        done = self.trainer.iter + 1
        if self._count and (done == self.trainer.max_iter or self._is_end(done)):
            self.trainer.storage.put_scalar(
                "epoch/total_loss", self._sum / self._count, smoothing_hint=False
            )
            self._sum, self._count = 0.0, 0

    def _is_end(self, done: int) -> bool:
        return done == round(round(done / self.per_epoch) * self.per_epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return the sum of the losses of the epoch so far, and their number."""
        return {"sum": self._sum, "count": self._count}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._sum, self._count = state_dict["sum"], state_dict["count"]


def writing_period(hook: EpochLoss | None) -> int:
    """Return the iterations between two writings: 20, or fewer where epochs are shorter.

    Writers see the latest value of a name only: they must write once in each epoch.
    """
    return 20 if hook is None else min(20, max(1, int(hook.per_epoch)))


def report_epochs(trainer: TrainerBase, folder: str | os.PathLike[str]) -> None:
    """Log loss and metrics of each epoch as a table, and draw them into ``epochs.png``.

    Args:
        trainer: after its training; nothing happens where it has no `EpochLoss`.
        folder: where ``metrics.json`` is.
    """
    hook = next((hook for hook in trainer._hooks if isinstance(hook, EpochLoss)), None)
    metrics = Path(folder, "metrics.json")
    if hook is None or not metrics.is_file():
        return
    from d2kit.visualization.epochs import epoch_rows, plot_epochs, table_of_epochs
    from d2kit.visualization.plots import read_metrics

    rows = epoch_rows(read_metrics(metrics), hook.per_epoch, trainer.max_iter)
    if rows:
        picture = plot_epochs(rows, Path(folder, "epochs.png"))
        logger.info("Epochs (%s):\n%s", picture, table_of_epochs(rows))
