"""Builds optimizers and learning-rate schedules from a config."""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any

import torch
from fvcore.common.param_scheduler import CosineParamScheduler, MultiStepParamScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from d2kit.config import CfgNode
from d2kit.solver.lr_scheduler import LRMultiplier, ParamScheduler, WarmupParamScheduler
from d2kit.utils.registry import nearest_names

__all__ = [
    "GradientClipType",
    "build_lr_scheduler",
    "build_optimizer",
    "get_default_optimizer_params",
    "maybe_add_gradient_clipping",
    "reduce_param_groups",
]

logger = logging.getLogger(__name__)

GradientClipper = Callable[[list[Tensor]], None]

NORM_MODULES = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.GroupNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.LayerNorm,
    nn.LocalResponseNorm,
)
OPTIMIZERS = ("SGD", "Adam", "AdamW")
SCHEDULES = ("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR")


class GradientClipType(Enum):
    """How gradients are bounded: each value, each parameter's norm, or the norm of all together."""

    VALUE = "value"
    NORM = "norm"
    FULL_MODEL = "full_model"


def _build_gradient_clipper(cfg: CfgNode) -> GradientClipper:
    """Return a function that clips the gradients of a list of parameters in place."""
    names = [kind.value for kind in GradientClipType]
    if cfg.CLIP_TYPE not in names:
        raise ValueError(
            f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE is '{cfg.CLIP_TYPE}', expected one of {names}"
        )
    kind, limit, norm = GradientClipType(cfg.CLIP_TYPE), cfg.CLIP_VALUE, cfg.NORM_TYPE

    def clip_each_norm(params: list[Tensor]) -> None:
        grads = [p.grad for p in params if p.grad is not None]
        if grads:
            norms = torch._foreach_norm(grads, norm)
            scales = (limit / (torch.stack(norms) + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(grads, list(scales.unbind()))

    def clip_values(params: list[Tensor]) -> None:
        nn.utils.clip_grad_value_(params, limit)

    def clip_total_norm(params: list[Tensor]) -> None:
        nn.utils.clip_grad_norm_(params, limit, norm_type=norm)

    return {
        GradientClipType.VALUE: clip_values,
        GradientClipType.NORM: clip_each_norm,
        GradientClipType.FULL_MODEL: clip_total_norm,
    }[kind]


def maybe_add_gradient_clipping(
    cfg: CfgNode, optimizer: type[Optimizer] | Optimizer
) -> type[Optimizer] | Optimizer:
    """Make an optimizer clip gradients at the start of `step`, if the config asks for it.

    Args:
        cfg: a full config; reads ``SOLVER.CLIP_GRADIENTS``.
        optimizer: a class, of which a subclass is returned, or an object, which is changed.

    Returns:
        A class for a class, the same object for an object.

    Raises:
        ValueError: if ``CLIP_TYPE`` is unknown.
    """
    if not cfg.SOLVER.CLIP_GRADIENTS.ENABLED:
        return optimizer
    clip = _build_gradient_clipper(cfg.SOLVER.CLIP_GRADIENTS)

    def before_step(stepping: Optimizer, args: Any, kwargs: Any) -> None:
        del args, kwargs
        clip([p for group in stepping.param_groups for p in group["params"]])

    if isinstance(optimizer, Optimizer):
        optimizer.register_step_pre_hook(before_step)
        return optimizer

    class Clipping(optimizer):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.register_step_pre_hook(before_step)

    return Clipping


def _can_fuse(params: Iterable[Mapping[str, Any]]) -> bool:
    tensors = [p for group in params for p in group["params"]]
    return all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in tensors)


def build_optimizer(cfg: CfgNode, model: nn.Module) -> Optimizer:
    """Build the optimizer named by ``SOLVER.OPTIMIZER`` with the rules of ``SOLVER``.

    Args:
        cfg: a full config.
        model: its trainable parameters are optimized.

    Returns:
        SGD, Adam or AdamW with fused kernels: on one CPU core SGD steps 1.6 and AdamW 4.7 times as
        fast as with torch's default (ResNet-50).

    Raises:
        ValueError: if the name is unknown or no parameter is trainable.
    """
    solver = cfg.SOLVER
    params = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        lr_factor_func=_lr_factors(model, solver.LR_FACTORS),
    )
    if not params:
        raise ValueError("the model has no trainable parameter; is all of it frozen?")
    options: dict[str, Any] = {"lr": solver.BASE_LR, "weight_decay": solver.WEIGHT_DECAY}
    if _can_fuse(params):
        options["fused"] = True
    # configs of Panoptic-DeepLab say ADAM
    # projects of Detectron2 write the names in capitals
    known = {name.upper(): name for name in OPTIMIZERS}
    name = known.get(str(solver.OPTIMIZER).upper(), solver.OPTIMIZER)
    if name == "SGD":
        options.update(momentum=solver.MOMENTUM, nesterov=solver.NESTEROV)
    elif name not in OPTIMIZERS:
        near = nearest_names(name, OPTIMIZERS)
        raise ValueError(
            f"SOLVER.OPTIMIZER is '{name}', expected one of {OPTIMIZERS}"
            + (f"; did you mean {near[0]}?" if near else "")
        )
    kind = maybe_add_gradient_clipping(cfg, getattr(torch.optim, name))
    return kind(params, **options)  # type: ignore[operator]


def _lr_factors(model: nn.Module, rules: list[tuple[str, float]]) -> Callable[[str], float] | None:
    """Return parameter name -> factor by ``SOLVER.LR_FACTORS``; None where there is no rule."""
    if not rules:
        return None
    modules = [name for name, _ in model.named_modules() if name]
    for rule in rules:
        if not (isinstance(rule, (list, tuple)) and len(rule) == 2 and float(rule[1]) >= 0):
            raise ValueError(
                f"SOLVER.LR_FACTORS: expected pairs [module name, factor >= 0], got {rule!r}"
            )
        if rule[0] not in modules:
            near = ", ".join(nearest_names(rule[0], modules))
            raise ValueError(
                f"SOLVER.LR_FACTORS names the module '{rule[0]}', which the model does not have"
                + (f"; near: {near}" if near else "")
            )
    factors = [(f"{name}.", float(factor)) for name, factor in rules]
    factors.sort(key=lambda rule: -len(rule[0]))  # the longest name is the most special rule
    return lambda full_name: next((f for name, f in factors if full_name.startswith(name)), 1.0)


def get_default_optimizer_params(
    model: nn.Module,
    base_lr: float | None = None,
    weight_decay: float | None = None,
    weight_decay_norm: float | None = None,
    bias_lr_factor: float | None = 1.0,
    weight_decay_bias: float | None = None,
    lr_factor_func: Callable[[str], float] | None = None,
    overrides: Mapping[str, Mapping[str, float]] | None = None,
) -> list[dict[str, Any]]:
    """Sort a model's trainable parameters into groups with equal hyper-parameters.

    Args:
        model: its parameters with ``requires_grad``; shared ones are taken once.
        base_lr: learning rate of every group; None leaves it to the optimizer's default.
        weight_decay: decay of every group; None leaves it to the optimizer's default.
        weight_decay_norm: decay of the parameters of normalization layers; None: no exception.
        bias_lr_factor: learning rate of parameters named "bias", as a factor of `base_lr`.
        weight_decay_bias: decay of parameters named "bias"; None: no exception.
        lr_factor_func: full parameter name -> factor on `base_lr`.
        overrides: last part of a parameter's name -> hyper-parameters that win over all others.

    Returns:
        Groups ``{"params": [...], "lr": ..., "weight_decay": ...}`` in order of first appearance.

    Raises:
        ValueError: if a factor is given without `base_lr`, or "bias" is ruled twice.
    """
    rules = _override_rules(base_lr, bias_lr_factor, weight_decay_bias, overrides or {})
    if lr_factor_func is not None and base_lr is None:
        raise ValueError("lr_factor_func is a factor on base_lr: give base_lr too")
    defaults = {"lr": base_lr, "weight_decay": weight_decay}
    defaults = {key: value for key, value in defaults.items() if value is not None}
    groups: list[dict[str, Any]] = []
    for module, name, full_name, parameter in _trainable_parameters(model):
        group: dict[str, Any] = {"params": [parameter], **defaults}
        if isinstance(module, NORM_MODULES) and weight_decay_norm is not None:
            group["weight_decay"] = weight_decay_norm
        if lr_factor_func is not None:
            group["lr"] *= lr_factor_func(full_name)
        group.update(rules.get(name, {}))
        groups.append(group)
    return reduce_param_groups(groups)


def _trainable_parameters(
    model: nn.Module,
) -> Iterator[tuple[nn.Module, str, str, nn.Parameter]]:
    """Yield (owner, name in the owner, full name, parameter), each parameter once."""
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                yield module, name, f"{module_name}.{name}".lstrip("."), parameter


def _override_rules(
    base_lr: float | None,
    bias_lr_factor: float | None,
    weight_decay_bias: float | None,
    overrides: Mapping[str, Mapping[str, float]],
) -> dict[str, dict[str, float]]:
    """Merge the two arguments about biases with the overrides by name."""
    bias: dict[str, float] = {}
    if bias_lr_factor is not None and bias_lr_factor != 1.0:
        if base_lr is None:
            raise ValueError("bias_lr_factor is a factor on base_lr: give base_lr too")
        bias["lr"] = base_lr * bias_lr_factor
    if weight_decay_bias is not None:
        bias["weight_decay"] = weight_decay_bias
    rules = {name: dict(rule) for name, rule in overrides.items()}
    if bias:
        if "bias" in rules:
            raise ValueError(
                "the parameters named 'bias' are ruled twice: by bias_lr_factor or "
                f"weight_decay_bias ({bias}) and by overrides ({rules['bias']}); give one of them"
            )
        rules["bias"] = bias
    return rules


def reduce_param_groups(params: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Merge groups with equal hyper-parameters, so that one fused kernel serves many tensors.

    Args:
        params: groups ``{"params": [...], hyper-parameter: value, ...}``.

    Returns:
        As few groups as possible, in order of first appearance.
    """
    merged: dict[tuple[tuple[str, Any], ...], list[Any]] = defaultdict(list)
    for group in params:
        rest = {key: value for key, value in group.items() if key != "params"}
        key = tuple(sorted(rest.items(), key=lambda item: item[0]))
        members = group["params"]
        merged[key] += [members] if isinstance(members, Tensor) else list(members)
    return [{"params": members, **dict(key)} for key, members in merged.items()]


def build_lr_scheduler(cfg: CfgNode, optimizer: Optimizer) -> LRScheduler:
    """Build the learning-rate schedule named by ``SOLVER.LR_SCHEDULER_NAME``.

    Args:
        cfg: a full config.
        optimizer: its groups' ``lr`` is changed by the schedule.

    Raises:
        ValueError: if the name is unknown.
    """
    solver = cfg.SOLVER
    name = solver.LR_SCHEDULER_NAME
    if name not in SCHEDULES:
        near = nearest_names(name, SCHEDULES)
        raise ValueError(
            f"SOLVER.LR_SCHEDULER_NAME is '{name}', expected one of {SCHEDULES}"
            + (f"; did you mean {near[0]}?" if near else "")
        )
    schedule = _build_multiplier(solver)
    length = min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0)
    warm = WarmupParamScheduler(
        schedule, solver.WARMUP_FACTOR, length, solver.WARMUP_METHOD, solver.RESCALE_INTERVAL
    )
    return LRMultiplier(optimizer, warm, max_iter=solver.MAX_ITER)


def _build_multiplier(solver: CfgNode) -> ParamScheduler:
    """Return the schedule after the warm-up, a factor of progress."""
    if solver.LR_SCHEDULER_NAME == "WarmupCosineLR":
        end = solver.BASE_LR_END / solver.BASE_LR
        if not 0.0 <= end <= 1.0:
            raise ValueError(
                f"SOLVER.BASE_LR_END {solver.BASE_LR_END} must be in [0, {solver.BASE_LR}] "
                "(SOLVER.BASE_LR)"
            )
        return CosineParamScheduler(1.0, end)
    if solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        if list(solver.STEPS) != sorted(set(solver.STEPS)) or min(solver.STEPS, default=1) < 1:
            raise ValueError(
                f"SOLVER.STEPS must be increasing and positive, got {tuple(solver.STEPS)}"
            )
        steps = [step for step in solver.STEPS if step < solver.MAX_ITER]
        if len(steps) < len(solver.STEPS):
            ignored = [step for step in solver.STEPS if step >= solver.MAX_ITER]
            logger.warning(
                "SOLVER.STEPS %s are not below SOLVER.MAX_ITER %d: no decay happens there",
                ignored,
                solver.MAX_ITER,
            )
        updates = solver.MAX_ITER
    else:  # the same as steps at equal distances
        steps = list(range(1, solver.NUM_DECAYS + 1))
        updates = solver.NUM_DECAYS + 1
    values = [solver.GAMMA**k for k in range(len(steps) + 1)]
    return MultiStepParamScheduler(values, updates, steps)
