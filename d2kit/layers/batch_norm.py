"""Normalisation layers and `get_norm`, which makes one from its name in a config."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from d2kit.utils import comm
from d2kit.utils.devices import is_symbolic
from d2kit.utils.registry import nearest_names

__all__ = [
    "CycleBatchNormList",
    "FrozenBatchNorm2d",
    "LayerNorm",
    "NaiveSyncBatchNorm",
    "SyncBatchNorm",
    "get_norm",
]

_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


class FrozenBatchNorm2d(nn.Module):
    """BatchNorm2d with fixed statistics and a fixed affine map, all kept as buffers.

    Args:
        num_features: C.
        eps: added to the variance before the square root.
    """

    _version = 3

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    _kept: tuple[tuple[Tensor, ...], list[int], tuple[Tensor, Tensor]] | None = None

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        # with a variance of 1 - eps a fresh layer is the identity
        fresh = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0 - eps}
        for name, value in fresh.items():
            self.register_buffer(name, torch.full((num_features,), value))

    def affine(self) -> tuple[Tensor, Tensor]:
        """Return (scale, shift), each (C,): ``forward(x)`` is ``x * scale + shift`` per channel.

        On CUDA they are computed once: there the five kernels of each of the 53 layers of a
        ResNet-50 cost more than they compute. They are thrown away when a buffer is replaced or
        written in place (but not through ``.data``, which nobody can see).
        """
        buffers = (self.weight, self.bias, self.running_mean, self.running_var)
        if not self.weight.is_cuda or is_symbolic() or any(b.is_inference() for b in buffers):
            return self._affine()
        versions = [b._version for b in buffers]
        if self._kept is not None:
            of, then, parts = self._kept
            if then == versions and all(a is b for a, b in zip(of, buffers, strict=True)):
                return parts
        with torch.inference_mode(mode=False):  # training may use them later
            parts = self._affine()
        self._kept = (buffers, versions, parts)
        return parts

    def _affine(self) -> tuple[Tensor, Tensor]:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` (N, C, H, W) with the fixed statistics."""
        # One pass over x, of which nothing is kept for the backward pass; x * scale + shift takes
        # longer (2x256x100x150, one thread: 31 ms instead of 9; channels last 14 and 7).
        scale, shift = (part.to(x.dtype)[:, None, None] for part in self.affine())
        return torch.addcmul(shift, x, scale)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # weights of a trained BatchNorm2d fit; its step counter means nothing here
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __repr__(self) -> str:
        return f"FrozenBatchNorm2d(num_features={self.num_features}, eps={self.eps})"

    @classmethod
    def convert_frozen_batchnorm(cls, module: nn.Module) -> nn.Module:
        """Replace every BatchNorm2d and SyncBatchNorm in `module` by a frozen one.

        Args:
            module: changed in place, except where it is itself a batch norm.

        Returns:
            `module`, or its frozen replacement where it is itself a batch norm.
        """

        def frozen(bn: nn.Module) -> nn.Module:
            assert isinstance(bn, _BATCH_NORMS)
            new = cls(bn.num_features, bn.eps)
            return _copy_statistics(bn, new)

        return _replace(module, _BATCH_NORMS, frozen)

    @classmethod
    def convert_frozenbatchnorm2d_to_batchnorm2d(cls, module: nn.Module) -> nn.Module:
        """Replace every FrozenBatchNorm2d in `module` by a trainable BatchNorm2d.

        Args:
            module: changed in place, except where it is itself a FrozenBatchNorm2d.

        Returns:
            `module`, or its replacement where it is itself a FrozenBatchNorm2d.
        """

        def thawed(bn: nn.Module) -> nn.Module:
            assert isinstance(bn, FrozenBatchNorm2d)
            return _copy_statistics(bn, nn.BatchNorm2d(bn.num_features, bn.eps))

        return _replace(module, (cls,), thawed)


def _copy_statistics(source: nn.Module, target: nn.Module) -> nn.Module:
    """Copy the affine map and statistics that `source` has; return `target` on its device."""
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_var"):
            value = getattr(source, name, None)
            if value is not None:
                target.to(value.device)
                getattr(target, name).copy_(value)
    return target.train(source.training)


def _replace(
    module: nn.Module, kinds: tuple[type[nn.Module], ...], make: Callable[[nn.Module], nn.Module]
) -> nn.Module:
    """Replace the descendants of `module` (or itself) that are of `kinds`."""
    if isinstance(module, kinds):
        return make(module)
    for name, child in module.named_children():
        new = _replace(child, kinds, make)
        if new is not child:
            setattr(module, name, new)
    return module


class _AllReduceSum(torch.autograd.Function):
    """Sum over processes whose gradient is the sum of the gradients of all processes."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:  # type: ignore[override]
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:  # type: ignore[override]
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


class NaiveSyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d with statistics over all processes, on any device and backend (gloo too).

    Args:
        *args: as of torch.nn.BatchNorm2d.
        stats_mode: ``""`` gives every process the same weight; ``"N"`` gives every pixel the same
            weight, as if all were on one process: right also where batch sizes differ or are 0 on
            some processes.
        **kwargs: as of torch.nn.BatchNorm2d.
    """

    def __init__(self, *args: Any, stats_mode: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if stats_mode not in ("", "N"):
            raise ValueError(
                f"NaiveSyncBatchNorm: expected stats_mode '' or 'N', got '{stats_mode}'"
            )
        self._stats_mode = stats_mode

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `input` (N, C, H, W); one process or evaluation is plain BatchNorm2d."""
        if comm.get_world_size() == 1 or not self.training:
            return super().forward(input)
        x = input.float()
        batch = x.shape[0]
        if batch == 0 and self._stats_mode == "":
            raise ValueError('NaiveSyncBatchNorm: an empty batch needs stats_mode="N"')
        sums = torch.cat([x.sum((0, 2, 3)), (x * x).sum((0, 2, 3))])
        count = x.new_full((1,), float(x.shape[0] * x.shape[2] * x.shape[3]))
        if self._stats_mode == "":
            sums, count = sums / count, torch.ones_like(count)
        total = _AllReduceSum.apply(torch.cat([sums, count]))
        n = total[-1].detach()
        mean, mean_square = (total[:-1] / n.clamp(min=1)).chunk(2)
        var = mean_square - mean * mean
        if self.track_running_stats:
            self._update(mean.detach(), var.detach(), (n > 0).to(x.dtype))
        scale = torch.rsqrt(var + self.eps)
        if self.affine:
            scale = scale * self.weight
        shift = -mean * scale
        if self.affine:
            shift = shift + self.bias
        found: Tensor = (x * scale[:, None, None] + shift[:, None, None]).to(input.dtype)
        return found

    @torch.no_grad()
    def _update(self, mean: Tensor, var: Tensor, any_sample: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        momentum = self.momentum
        if momentum is None:  # torch's convention: cumulative average
            momentum = 1.0 / float(self.num_batches_tracked)
        self.running_mean += any_sample * momentum * (mean - self.running_mean)
        self.running_var += any_sample * momentum * (var - self.running_var)


class SyncBatchNorm(NaiveSyncBatchNorm):
    """BatchNorm2d with statistics over all processes: torch's own on CUDA, ours elsewhere.

    The input's device decides, not what the machine has: torch's refuses other devices, also for a
    model on the CPU of a machine with GPUs. State and output are the same; between processes ours
    keeps the biased variance as running variance, torch's the unbiased one.

    Args:
        num_features: C.
        **kwargs: as of torch.nn.BatchNorm2d.
    """

    process_group = None  # torch's: all processes
    _check_non_zero_input_channels: Any = nn.SyncBatchNorm._check_non_zero_input_channels

    def __init__(self, num_features: int, **kwargs: object) -> None:
        super().__init__(num_features, stats_mode="N", **kwargs)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `input` (N, C, H, W); one process or evaluation is plain BatchNorm2d."""
        if input.is_cuda and comm.get_world_size() > 1:
            return nn.SyncBatchNorm.forward(cast(nn.SyncBatchNorm, self), input)
        return super().forward(input)


class CycleBatchNormList(nn.ModuleList):
    """Batch norms used in turn, one per call, with one shared affine map.

    It gives each domain or feature level its own statistics where a head is applied to `length`
    inputs in a fixed order.

    Args:
        length: number of norms.
        bn_class: class of the norms.
        **kwargs: arguments of `bn_class`; `num_features` is required, `affine` is the shared map's.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self, length: int, bn_class: type[nn.Module] = nn.BatchNorm2d, **kwargs: Any
    ) -> None:
        shared = bool(kwargs.pop("affine", True))
        super().__init__(bn_class(affine=False, **kwargs) for _ in range(length))
        for name, value in (("weight", 1.0), ("bias", 0.0)):
            initial = torch.full((kwargs["num_features"],), value) if shared else None
            self.register_parameter(name, None if initial is None else nn.Parameter(initial))
        self._turn = 0  # index of the norm that comes next

    def forward(self, x: Tensor) -> Tensor:
        """Apply the next norm of the cycle to `x` (N, C, H, W)."""
        norm, self._turn = self[self._turn], (self._turn + 1) % len(self)
        normalised: Tensor = norm(x)
        if self.weight is None or self.bias is None:
            return normalised
        return normalised * self.weight[:, None, None] + self.bias[:, None, None]

    def extra_repr(self) -> str:
        """Say whether there is a shared affine map."""
        return f"affine={self.weight is not None}"


class LayerNorm(nn.Module):
    """Layer norm over the channels of a channels-first map.

    Args:
        normalized_shape: C.
        eps: added to the variance before the square root.

    Source: Liu et al., A ConvNet for the 2020s (2022).
    """

    def __init__(self, normalized_shape: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(normalized_shape))
        self.bias = nn.Parameter(torch.zeros(normalized_shape))
        self.eps = eps
        self.normalized_shape = (normalized_shape,)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` (N, C, H, W) over C at each pixel."""
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "BN": nn.BatchNorm2d,
    "SyncBN": SyncBatchNorm,
    "FrozenBN": FrozenBatchNorm2d,
    "GN": partial(nn.GroupNorm, 32),
    "nnSyncBN": nn.SyncBatchNorm,
    "naiveSyncBN": NaiveSyncBatchNorm,
    "naiveSyncBN_N": partial(NaiveSyncBatchNorm, stats_mode="N"),
    "LN": LayerNorm,
}


def get_norm(norm: str | Callable[[int], nn.Module] | None, out_channels: int) -> nn.Module | None:
    """Make a normalisation layer.

    Args:
        norm: "", "BN", "SyncBN", "FrozenBN", "GN" (32 groups), "nnSyncBN", "naiveSyncBN",
            "naiveSyncBN_N", "LN", or a function from the number of channels to a module.
        out_channels: C.

    Returns:
        The layer, or None for "" and None.

    Raises:
        ValueError: if the name is unknown.
    """
    if norm is None or norm == "":
        return None
    if not isinstance(norm, str):
        return norm(out_channels)
    if norm not in _NORMS:
        near = nearest_names(norm, _NORMS)
        raise ValueError(
            f"get_norm: unknown norm '{norm}'; nearest: {near or 'none'}, known: {sorted(_NORMS)}"
        )
    return _NORMS[norm](out_channels)
