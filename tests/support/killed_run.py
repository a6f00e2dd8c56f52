"""A tiny training that kills itself: python -m tests.support.killed_run IMAGES OUTPUT STEP."""

import os
import signal
import sys
from pathlib import Path

from d2kit.engine import CallbackHook
from tests.support import tiny_run as tiny


def main(images: str, output: str, step: str) -> None:
    tiny.register(Path(images))
    trainer = tiny.TinyTrainer(tiny.tiny_cfg(output, "SEED", -1, "DATALOADER.NUM_WORKERS", 2))

    def die(trainer) -> None:
        if trainer.iter == int(step):
            os.kill(os.getpid(), signal.SIGKILL)

    trainer.register_hooks([CallbackHook(before_step=die)])
    trainer.resume_or_load(resume=True)
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
