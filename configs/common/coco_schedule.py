"""Schedules on COCO by their usual names: 1x is 90,000 steps of 16 images, about 12 epochs."""

from typing import Any

from fvcore.common.param_scheduler import MultiStepParamScheduler

from d2kit.config import LazyCall as L
from d2kit.solver import WarmupParamScheduler

STEPS_OF_1X = 90000


def default_X_scheduler(num_X: int) -> Any:
    """Return the multiplier of the learning rate over `num_X` times 90,000 steps.

    It drops to 0.1 and 0.01 near the end: 60,000 and 20,000 steps before it, but 30,000 and 10,000
    for the 1x schedule.
    """
    total = num_X * STEPS_OF_1X
    before_end = (30000, 10000) if num_X <= 2 else (60000, 20000)
    return L(WarmupParamScheduler)(
        scheduler=L(MultiStepParamScheduler)(
            values=[1.0, 0.1, 0.01],
            milestones=[*(total - steps for steps in before_end), total],
        ),
        warmup_length=1000 / total,
        warmup_method="linear",
        warmup_factor=0.001,
    )


lr_multiplier_1x = default_X_scheduler(1)
lr_multiplier_2x = default_X_scheduler(2)
lr_multiplier_3x = default_X_scheduler(3)
lr_multiplier_6x = default_X_scheduler(6)
lr_multiplier_9x = default_X_scheduler(9)
