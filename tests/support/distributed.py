"""What the processes of the launch tests run; also by torchrun as a module."""

import json
import sys
from pathlib import Path

import torch

from d2kit.engine import HookBase, launch
from d2kit.utils import comm
from d2kit.utils.events import get_event_storage
from tests.support import tiny_run as tiny


class QuietTrainer(tiny.TinyTrainer):
    """Without noise the losses do not depend on how a batch is split."""

    noise = False


class Losses(HookBase):
    def __init__(self):
        self.values = []

    def after_step(self):
        if comm.is_main_process():
            self.values.append(get_event_storage().latest()["total_loss"][0])


def train(images, output, poison=None):
    """Train 4 iterations; return the losses."""
    tiny.register(Path(images))
    cfg = tiny.tiny_cfg(output, "SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2)
    trainer = QuietTrainer(cfg)
    model = getattr(trainer.model, "module", trainer.model)
    model.poison = poison
    losses = Losses()
    trainer.register_hooks([losses])
    trainer.resume_or_load(resume=False)
    trainer.train()
    return losses.values


def main(folder, fail):
    """Train, poison one image, and at last fail on rank 1."""
    folder, rank = Path(folder), comm.get_rank()
    facts = {
        "world": comm.get_world_size(),
        "local_rank": comm.get_local_rank(),
        "threads": torch.get_num_threads(),
        "losses": train(folder / "images", folder / "two"),
    }
    try:
        train(folder / "images", folder / "poisoned", poison={4})
    except FloatingPointError as error:
        facts["error"] = str(error)
    (folder / f"rank{rank}.json").write_text(json.dumps(facts))
    comm.synchronize()
    if rank == 1 and fail:
        raise RuntimeError("rank 1 fails on purpose")


def leave(code):
    if comm.get_rank() == 1:
        sys.exit(code)


if __name__ == "__main__":
    launch(main, 1, args=(sys.argv[1], False))
