"""What is kept of a step whose loss is not finite, so that it can be looked at and replayed."""

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2kit.checkpoint.files import plain_state
from d2kit.utils import comm
from d2kit.utils.file_io import atomic_write

__all__ = ["NonFiniteLossError", "StatisticsKeeper", "StepOfRank", "guarded_step", "write_dump"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepOfRank:
    """What one process did in a step.

    Args:
        images: ids of its images.
        losses: name -> value, before averaging over the processes.
    """

    images: list[Any]
    losses: dict[str, float]


class NonFiniteLossError(FloatingPointError):
    """The losses of a step are not finite on some process; raised on all of them.

    Args:
        text: the message.
        iteration: of the step.
        ranks: what each process did.
        updated: whether the step has changed the weights before it was checked.
    """

    def __init__(
        self, text: str, iteration: int, ranks: Sequence[StepOfRank], *, updated: bool
    ) -> None:
        super().__init__(text)
        self.updated = updated
        self.iteration = iteration
        self.ranks = list(ranks)


class StatisticsKeeper:
    """Undoes what a step that failed before its update did to a model.

    The check of the losses comes before the update of the weights, but after the forward pass, in
    which BatchNorm has averaged: its statistics are kept from before each step.

    Args:
        model: whose statistics are kept.
    """

    def __init__(self, model: nn.Module) -> None:
        self._live = [
            buffer
            for module in model.modules()
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats
            for buffer in module.buffers(recurse=False)
        ]
        # Averages apart from counters: of one type they are copied in one call.
        self._live.sort(key=lambda buffer: not buffer.is_floating_point())
        self._floats = sum(buffer.is_floating_point() for buffer in self._live)
        self._kept: list[Tensor] = []

    def before_step(self) -> None:
        """Keep the statistics."""
        if not self._kept:
            self._kept = [buffer.clone() for buffer in self._live]
        self._copy(self._kept, self._live)

    def restore(self) -> None:
        """Put the statistics back."""
        self._copy(self._live, self._kept)

    def _copy(self, targets: list[Tensor], sources: list[Tensor]) -> None:
        for part in (slice(self._floats), slice(self._floats, None)):
            if targets[part]:
                torch._foreach_copy_(targets[part], sources[part])


def write_dump(
    folder: Path, error: NonFiniteLossError, checkpoint: Mapping[str, Any], config: str
) -> Path:
    """Write what `d2kit replay` needs: ``failure.json``, ``state.pth`` and ``config.yaml``.

    Args:
        folder: the output folder.
        error: what happened.
        checkpoint: weights and state of the training before the step.
        config: the config as YAML.

    Returns:
        The folder of the dump.
    """
    dump = folder / f"failed_step_{error.iteration:07d}"
    dump.mkdir(exist_ok=True)
    state = checkpoint["trainer"]["_trainer"]["optimizer"]
    facts = {
        "iteration": error.iteration,
        "learning_rates": sorted({group["lr"] for group in state["param_groups"]}),
        "ranks": [
            {
                "images": rank.images,
                # JSON knows no NaN
                "losses": {k: v if math.isfinite(v) else str(v) for k, v in rank.losses.items()},
            }
            for rank in error.ranks
        ],
        "seed": checkpoint["trainer"]["seed"],
        "weights": "after the step" if error.updated else "before the step",
    }
    with atomic_write(dump / "state.pth") as file:
        torch.save(checkpoint, file)
    with atomic_write(dump / "config.yaml", "w") as file:
        file.write(config)
    with atomic_write(dump / "failure.json", "w") as file:
        json.dump(facts, file, indent=1, default=str)
    logger.error("The step is kept in %s; to replay it: d2kit replay %s", dump, dump)
    return dump


@contextmanager
def guarded_step(trainer: Any) -> Iterator[None]:
    """Around a step of a `DefaultTrainer`: one that fails is undone and written down.

    Args:
        trainer: has `model`, `cfg`, `checkpointer`, `seed` and an inner trainer.
    """
    keeper = trainer.__dict__.setdefault("_statistics", None) or StatisticsKeeper(trainer.model)
    trainer._statistics = keeper
    keeper.before_step()
    try:
        yield
    except NonFiniteLossError as error:
        if not error.updated:
            keeper.restore()
        if comm.is_main_process():
            _dump(trainer, error)
        raise


def _dump(trainer: Any, error: NonFiniteLossError) -> None:
    """Write the dump; a problem with that is only logged, so that the failure itself is seen."""
    try:
        model = getattr(trainer.model, "module", trainer.model)
        inner = trainer._trainer.state_dict()
        state = {"iteration": error.iteration - 1, "seed": trainer.seed, "_trainer": inner}
        checkpoint = {"model": model.state_dict(), "trainer": plain_state(state, "trainer")}
        write_dump(Path(trainer.checkpointer.save_dir), error, checkpoint, trainer.cfg.dump())
    except (OSError, TypeError) as problem:
        logger.error("The failed step could not be kept: %s", problem)  # noqa: TRY400
