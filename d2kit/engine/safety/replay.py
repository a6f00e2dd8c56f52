"""Does a failed step again, from its dump."""

import logging
import math
import tempfile
from pathlib import Path
from typing import Any

import torch

from d2kit.checkpoint.files import read_checkpoint
from d2kit.config import get_cfg
from d2kit.engine.default_trainer import DefaultTrainer
from d2kit.engine.resolve import start_loader_at
from d2kit.utils.env import derive_seed, seed_all_rng
from d2kit.utils.events import EventStorage
from d2kit.utils.file_io import load_json

__all__ = ["default_replay"]

logger = logging.getLogger(__name__)


def default_replay(
    dump: Path, trainer_class: type[DefaultTrainer] = DefaultTrainer
) -> list[dict[str, float]]:
    """Do the forward passes of a failed step again, of one process after the other.

    What a process divides by a mean over all processes is here its own; so its losses may differ
    by a factor from those of the dump.

    Args:
        dump: folder that a failed training has written; the datasets of its config are registered.
        trainer_class: what was trained with.

    Returns:
        The losses of each process.

    Raises:
        FileNotFoundError: if the folder is no dump.
        ValueError: if the loader yields other images than the step had.
    """
    if not (dump / "failure.json").is_file():
        raise FileNotFoundError(f"'{dump}' has no failure.json: give the folder failed_step_...")
    facts = load_json(dump / "failure.json")
    cfg = get_cfg()
    cfg.merge_from_file(str(dump / "config.yaml"))
    with tempfile.TemporaryDirectory() as scratch:
        cfg.OUTPUT_DIR = scratch
        cfg.DATALOADER.NUM_WORKERS = 0
        trainer = trainer_class(cfg)
        trainer.checkpointer.load(str(dump / "state.pth"), checkpointables=[])
        state = read_checkpoint(dump / "state.pth")["trainer"]
        trainer._trainer.load_state_dict({**state["_trainer"], "iteration": 0})
        start_loader_at(trainer.data_loader, facts["iteration"])
        batch = list(next(iter(trainer.data_loader)))
        with EventStorage(facts["iteration"]):
            return [
                _forward(trainer, _take(batch, rank["images"]), facts, index)
                for index, rank in enumerate(facts["ranks"])
            ]


def _take(batch: list[Any], images: list[Any]) -> list[Any]:
    """Remove the samples of these images from a batch, and return them in this order."""
    found = []
    for image in images:
        place = next(
            (
                k
                for k, sample in enumerate(batch)
                if image in (sample.get("image_id"), sample.get("file_name"))
            ),
            None,
        )
        if place is None:
            raise ValueError(
                f"image {image!r} of the failed step is not in the batch of its iteration: the "
                "dataset or its order has changed since"
            )
        found.append(batch.pop(place))
    return found


def _forward(
    trainer: DefaultTrainer, batch: list[Any], facts: dict[str, Any], rank: int
) -> dict[str, float]:
    """Return the losses of a process's batch, under its random numbers; log them."""
    seed_all_rng(derive_seed(facts["seed"], facts["iteration"], rank))
    trainer.model.train()
    inner = trainer._trainer
    with torch.no_grad(), inner._forward_context():
        found = trainer.model(batch)
    losses = found if isinstance(found, dict) else {"total_loss": found}
    numbers = {name: float(value) for name, value in losses.items()}
    then = facts["ranks"][rank]["losses"]
    for name, value in sorted(numbers.items()):
        mark = "" if math.isfinite(value) else "  <- not finite"
        logger.info("rank %d %s: %.6g (then %s)%s", rank, name, value, then.get(name), mark)
    return numbers
