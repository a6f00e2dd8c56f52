"""The hook that averages the weights over the iterations."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from fvcore.common.checkpoint import Checkpointer
from torch import Tensor, nn

from d2kit.engine.trainer_base import HookBase
from d2kit.utils import comm

__all__ = ["WeightAveraging"]


class WeightAveraging(HookBase):
    """Keeps an exponential moving average of a model's weights, to evaluate with.

    After each iteration ``average = d * average + (1 - d) * weights``, of parameters and of
    BatchNorm's statistics; integers are copied. Register it before the hook that saves
    checkpoints, on all processes.

    Source: Polyak and Juditsky 1992; Tarvainen and Valpola 2017, section 2 (arXiv 1703.01780).

    Args:
        model: unwrapped if it is data-parallel.
        decay: d, in [0, 1).
        warmup: use the smaller of `decay` and (1 + t) / (10 + t) after t iterations, so that the
            random initial weights are soon forgotten.
        checkpointer: writes the average as ``<file_prefix>_final_ema.safetensors`` after the last
            iteration; None: nothing is written.
        file_prefix: start of the file name.

    Raises:
        ValueError: if `decay` is not in [0, 1).
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float,
        *,
        warmup: bool = True,
        checkpointer: Checkpointer | None = None,
        file_prefix: str = "model",
    ) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"the decay (SOLVER.EMA.DECAY) must be in [0, 1), got {decay}")
        self._model: nn.Module = comm.unwrap_model(model)
        self._decay = decay
        self._warmup = warmup
        self._checkpointer = checkpointer
        self._file_prefix = file_prefix
        self._average: dict[str, Tensor] = {}
        self._updates = 0

    def before_train(self) -> None:
        """Start from the weights of the model, unless an average was restored."""
        if not self._average:
            self._average = {name: x.clone() for name, x in self._model.state_dict().items()}

    def after_step(self) -> None:
        """Take the weights of this iteration in."""
        decay = self._decay
        if self._warmup:
            decay = min(decay, (1 + self._updates) / (10 + self._updates))
        floats: tuple[list[Tensor], list[Tensor]] = ([], [])
        for name, value in self._model.state_dict().items():
            if value.is_floating_point():
                floats[0].append(self._average[name])
                floats[1].append(value)
            else:
                self._average[name].copy_(value)
        torch._foreach_lerp_(*floats, 1 - decay)
        self._updates += 1

    def after_train(self) -> None:
        """Write the average, unless the training failed."""
        if self.trainer.iter >= self.trainer.max_iter:
            self.save(f"{self._file_prefix}_final_ema")

    def save(self, name: str) -> None:
        """Write the average as ``<name>.safetensors``, which MODEL.WEIGHTS can name."""
        if self._checkpointer is not None:
            with self.averaged():
                self._checkpointer.save(f"{name}.safetensors")

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the average into the model while the context lasts; then its own weights again."""
        own = {name: x.clone() for name, x in self._model.state_dict().items()}
        try:
            self._put(self._average or own)
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, weights: Mapping[str, Tensor]) -> None:
        for name, value in self._model.state_dict().items():
            value.copy_(weights[name])

    def state_dict(self) -> dict[str, Any]:
        """Return the average and the number of iterations in it."""
        return {"average": self._average, "updates": self._updates}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: if it is the average of another model.
        """
        found, own = state_dict["average"], self._model.state_dict()
        wrong = set(found) ^ set(own)
        wrong |= {k for k in set(found) & set(own) if found[k].shape != own[k].shape}
        if wrong:
            raise ValueError(
                "the averaged weights (SOLVER.EMA) of the checkpoint are of another model; "
                f"different: {sorted(wrong)[:5]}"
            )
        self._average = {name: x.to(own[name].device, copy=True) for name, x in found.items()}
        self._updates = state_dict["updates"]
