"""The divisor of one-stage detectors' losses."""

from typing import Any

import torch
from torch import Tensor, nn

from d2kit.utils import comm

_MOMENTUM = 0.9


class RunningCount(nn.Module):
    """Exponential average over the steps of a count, such as that of the positive anchors.

    A loss over the positives of a few images divides by it: the count of a single batch varies too
    much. The average is not part of the weights (no key in the state dict), but a checkpoint of the
    training holds it: see `training_state`.

    Args:
        initial: value before the first step, for a whole batch.
    """

    average: Tensor

    def __init__(self, initial: float) -> None:
        super().__init__()
        start = torch.full((), float(initial))
        self.register_buffer("average", start, persistent=False)

    def forward(self, count: Tensor) -> Tensor:
        """Take in the count of this step, and return the average, for one process.

        Args:
            count: 0-dim, of this process; at least 1 is taken for the whole batch.

        Returns:
            0-dim float, on the device: the average of the whole batch over the number of processes,
            so that the mean of the processes' losses is the loss of one on the whole batch.
        """
        world = comm.get_world_size()
        total = (comm.mean_over_ranks(count.float()) * world).clamp(min=1)
        # Not in place: the loss of a step before, whose gradient may be due, has the old value.
        self.average = _MOMENTUM * self.average + (1 - _MOMENTUM) * total
        return self.average / world

    def training_state(self) -> dict[str, Any]:
        """Return what a resumed training must know."""
        return {"average": self.average.clone()}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Take over what `training_state` returned."""
        self.average = state["average"].to(self.average)
