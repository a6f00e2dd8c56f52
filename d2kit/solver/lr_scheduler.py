"""Learning-rate schedules: a multiplier over training progress, with warm-up."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    ConstantParamScheduler,
    CosineParamScheduler,
    ExponentialParamScheduler,
    LinearParamScheduler,
    MultiStepParamScheduler,
    ParamScheduler,
    StepParamScheduler,
)
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

__all__ = [
    "CompositeParamScheduler",
    "ConstantParamScheduler",
    "CosineParamScheduler",
    "ExponentialParamScheduler",
    "LRMultiplier",
    "LRScheduler",
    "LinearParamScheduler",
    "MultiStepParamScheduler",
    "ParamScheduler",
    "StepParamScheduler",
    "WarmupCosineLR",
    "WarmupMultiStepLR",
    "WarmupParamScheduler",
]

WARMUP_METHODS = ("linear", "constant")


def _check_method(method: str) -> None:
    if method not in WARMUP_METHODS:
        raise ValueError(f"unknown warm-up method '{method}'; expected one of {WARMUP_METHODS}")


class WarmupParamScheduler(ParamScheduler):
    """Another schedule, preceded by a rise from a fraction of its first value.

    Source: linear warm-up, Goyal et al. 2017, section 2.2 (arXiv 1706.02677).

    Args:
        scheduler: the schedule after the warm-up; a function of progress in [0, 1).
        warmup_factor: first value as a fraction of `scheduler(0)`.
        warmup_length: share of training in [0, 1] that the warm-up takes.
        warmup_method: "linear" rises to where the schedule continues; "constant" stays low.
        rescale_interval: if True the whole schedule runs after the warm-up, compressed; if False
            the warm-up replaces its beginning.
    """

    def __init__(
        self,
        scheduler: ParamScheduler,
        warmup_factor: float,
        warmup_length: float,
        warmup_method: str = "linear",
        rescale_interval: bool = False,
    ) -> None:
        _check_method(warmup_method)
        if not 0.0 <= warmup_length <= 1.0:
            raise ValueError(f"warmup_length must be a share in [0, 1], got {warmup_length}")
        self._scheduler = scheduler
        self._length = warmup_length
        self._rescale = rescale_interval
        last = 1.0 - 2.0 * self.WHERE_EPSILON  # schedules are defined on [0, 1)
        self._first = warmup_factor * scheduler(0.0)
        if warmup_method == "constant":
            self._target = self._first
        else:
            self._target = scheduler(0.0 if rescale_interval else min(warmup_length, last))

    def __call__(self, where: float) -> float:
        """Return the factor at progress `where` in [0, 1)."""
        if where + self.WHERE_EPSILON <= self._length:
            share = where / self._length
            return self._first * (1.0 - share) + self._target * share
        if self._rescale and self._length < 1.0:
            where = max(where - self._length, 0.0) / (1.0 - self._length)
        return self._scheduler(where)


class LRMultiplier(LRScheduler):
    """Sets each group's learning rate to its initial one times a schedule of training progress.

    Args:
        optimizer: whose groups' ``lr`` is changed; their present ``lr`` is the initial one.
        multiplier: function of progress in [0, 1) that returns a factor.
        max_iter: number of steps of the whole training.
        last_iter: index of the step done last; -1 at the start.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        multiplier: ParamScheduler,
        max_iter: int,
        last_iter: int = -1,
    ) -> None:
        if not isinstance(multiplier, ParamScheduler):
            raise ValueError(
                "LRMultiplier: multiplier must be a fvcore.common.param_scheduler.ParamScheduler, "
                f"got {type(multiplier).__name__}"
            )
        self._multiplier = multiplier
        self._max_iter = max_iter
        super().__init__(optimizer, last_epoch=last_iter)

    def state_dict(self) -> dict[str, Any]:
        """Return what cannot be rebuilt from the config: initial rates and the step."""
        return {"base_lrs": self.base_lrs, "last_epoch": self.last_epoch}

    def get_lr(self) -> list[float | Tensor]:
        """Return the learning rate of each group for the coming step."""
        # After the last step torch asks once more, at progress 1, where schedules are undefined.
        last = 1.0 - 2.0 * ParamScheduler.WHERE_EPSILON
        done = self.last_epoch >= self._max_iter
        factor = self._multiplier(last if done else self.last_epoch / self._max_iter)
        return [base * factor for base in self.base_lrs]


class WarmupLR(LRScheduler):
    """A warm-up factor times a factor that a subclass gives for each step.

    Args:
        optimizer: whose groups' ``lr`` is changed.
        warmup_factor: factor at step 0.
        warmup_iters: number of warm-up steps.
        warmup_method: "linear" or "constant".
        last_epoch: index of the step done last; -1 at the start.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_factor: float,
        warmup_iters: int,
        warmup_method: str,
        last_epoch: int,
    ) -> None:
        _check_method(warmup_method)
        self.warmup_factor = warmup_factor
        self.warmup_iters = warmup_iters
        self.warmup_method = warmup_method
        super().__init__(optimizer, last_epoch)

    def _factor(self, step: int) -> float:
        """Return the factor on the initial rate at `step`, were there no warm-up."""
        raise NotImplementedError

    def _compute_values(self) -> list[float | Tensor]:
        """Return the learning rate of each group; user classes call or override it."""
        return self.get_lr()

    def get_lr(self) -> list[float | Tensor]:
        """Return the learning rate of each group for the coming step."""
        step = self.last_epoch
        factor = self._factor(step) * _get_warmup_factor_at_iter(
            self.warmup_method, step, self.warmup_iters, self.warmup_factor
        )
        return [base * factor for base in self.base_lrs]


class WarmupMultiStepLR(WarmupLR):
    """Multiplies the rate by `gamma` at each milestone, after a warm-up.

    Args:
        optimizer: whose groups' ``lr`` is changed.
        milestones: increasing step indices.
        gamma: the factor at each milestone.
        warmup_factor: factor at step 0.
        warmup_iters: number of warm-up steps.
        warmup_method: "linear" or "constant".
        last_epoch: index of the step done last; -1 at the start.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        milestones: Sequence[int],
        gamma: float = 0.1,
        warmup_factor: float = 0.001,
        warmup_iters: int = 1000,
        warmup_method: str = "linear",
        last_epoch: int = -1,
    ) -> None:
        if list(milestones) != sorted(milestones):
            raise ValueError(f"milestones must be increasing integers, got {list(milestones)}")
        self.milestones = list(milestones)
        self.gamma = gamma
        super().__init__(optimizer, warmup_factor, warmup_iters, warmup_method, last_epoch)

    def _factor(self, step: int) -> float:
        return self.gamma ** bisect_right(self.milestones, step)


class WarmupCosineLR(WarmupLR):
    """Half a cosine from the initial rate to 0, times a warm-up factor.

    Source: Loshchilov and Hutter 2017, section 3, without restarts (arXiv 1608.03983).

    Args:
        optimizer: whose groups' ``lr`` is changed.
        max_iters: number of steps until 0.
        warmup_factor: factor at step 0.
        warmup_iters: number of warm-up steps.
        warmup_method: "linear" or "constant".
        last_epoch: index of the step done last; -1 at the start.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        max_iters: int,
        warmup_factor: float = 0.001,
        warmup_iters: int = 1000,
        warmup_method: str = "linear",
        last_epoch: int = -1,
    ) -> None:
        self.max_iters = max_iters
        super().__init__(optimizer, warmup_factor, warmup_iters, warmup_method, last_epoch)

    def _factor(self, step: int) -> float:
        return (1.0 + math.cos(math.pi * step / self.max_iters)) / 2


def _get_warmup_factor_at_iter(
    method: str, iter: int, warmup_iters: int, warmup_factor: float
) -> float:
    """Return the factor on the learning rate at a step.

    Args:
        method: "linear" or "constant".
        iter: index of the step, from 0.
        warmup_iters: number of warm-up steps; from there on the factor is 1.
        warmup_factor: factor at step 0.
    """
    _check_method(method)
    if iter >= warmup_iters:
        return 1.0
    if method == "constant":
        return warmup_factor
    return warmup_factor + (1.0 - warmup_factor) * iter / warmup_iters
