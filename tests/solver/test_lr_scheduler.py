import json
import math

import pytest
import torch
from fvcore.common.param_scheduler import (
    ConstantParamScheduler,
    CosineParamScheduler,
    LinearParamScheduler,
    MultiStepParamScheduler,
)

from d2kit.config import get_cfg
from d2kit.solver import (
    LRMultiplier,
    WarmupCosineLR,
    WarmupMultiStepLR,
    WarmupParamScheduler,
    build_lr_scheduler,
)
from d2kit.solver.build import _get_warmup_factor_at_iter
from tests.support.reference_files import reference_path


def sgd(lr=1.0):
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def rates(scheduler, steps):
    """Learning rate of each of `steps` steps."""
    seen = []
    for _ in range(steps):
        seen.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step()
    return seen


def reference_cfg(name):
    cfg = get_cfg()
    cfg.merge_from_list(
        ["SOLVER.BASE_LR", 0.02, "SOLVER.MAX_ITER", 60, "SOLVER.STEPS", (30, 50)]
        + ["SOLVER.WARMUP_ITERS", 10, "SOLVER.NUM_DECAYS", 3, "SOLVER.LR_SCHEDULER_NAME", name]
    )
    return cfg


@pytest.mark.parametrize("name", ["WarmupMultiStepLR", "WarmupCosineLR"])
def test_schedule_equals_reference(name):
    expected = json.loads(reference_path("ops/lr_schedules.json").read_text())[name]
    scheduler = build_lr_scheduler(reference_cfg(name), sgd(0.02))
    assert rates(scheduler, 60) == pytest.approx(expected, rel=1e-6)


def test_step_with_fixed_gamma_decays_at_equal_distances():
    cfg = reference_cfg("WarmupStepWithFixedGammaLR")
    cfg.SOLVER.WARMUP_ITERS = 0
    seen = rates(build_lr_scheduler(cfg, sgd(0.02)), 60)
    assert seen == pytest.approx([0.02 * 0.1 ** (i // 15) for i in range(60)])


def test_rescaled_interval_starts_the_schedule_after_the_warmup():
    cfg = reference_cfg("WarmupCosineLR")
    cfg.SOLVER.RESCALE_INTERVAL = True
    seen = rates(build_lr_scheduler(cfg, sgd(0.02)), 60)
    assert seen[10] == pytest.approx(0.02, rel=1e-4)
    assert seen[5] == pytest.approx(0.02 * (0.001 + 0.999 / 2))
    assert seen[35] == pytest.approx(0.02 * 0.5 * (1 + math.cos(math.pi * 25 / 50)))


def test_cosine_ends_at_base_lr_end():
    cfg = reference_cfg("WarmupCosineLR")
    cfg.SOLVER.BASE_LR_END = 0.01
    assert rates(build_lr_scheduler(cfg, sgd(0.02)), 60)[-1] == pytest.approx(0.01, rel=1e-2)


@pytest.mark.parametrize(("steps", "warns"), [((30, 60, 90), True), ((), False)])
def test_steps_beyond_the_end_are_ignored_with_a_warning(steps, warns, caplog):
    cfg = reference_cfg("WarmupMultiStepLR")
    cfg.SOLVER.STEPS = steps
    scheduler = build_lr_scheduler(cfg, sgd(0.02))
    assert ("no decay happens there" in caplog.text) == warns
    assert rates(scheduler, 60)[-1] == pytest.approx(0.002 if warns else 0.02)


def test_warmup_longer_than_training():
    cfg = reference_cfg("WarmupCosineLR")
    cfg.SOLVER.WARMUP_ITERS = 1000
    assert all(math.isfinite(x) for x in rates(build_lr_scheduler(cfg, sgd(0.02)), 60))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("LR_SCHEDULER_NAME", "WarmupCosine", "did you mean WarmupCosineLR"),
        ("STEPS", (50, 30), "increasing"),
        ("WARMUP_METHOD", "quadratic", "unknown warm-up method"),
    ],
)
def test_mistakes_in_the_config_are_named(key, value, message):
    cfg = reference_cfg("WarmupMultiStepLR")
    cfg.SOLVER[key] = value
    with pytest.raises(ValueError, match=message):
        build_lr_scheduler(cfg, sgd())


def test_constant_warmup_stays_low():
    schedule = WarmupParamScheduler(ConstantParamScheduler(2.0), 0.1, 0.5, "constant")
    assert [schedule(w) for w in (0.0, 0.4, 0.6)] == pytest.approx([0.2, 0.2, 2.0])


def test_linear_warmup_meets_the_schedule_where_it_continues():
    schedule = WarmupParamScheduler(LinearParamScheduler(1.0, 0.0), 0.0, 0.5)
    assert [schedule(w) for w in (0.0, 0.25, 0.5, 0.75)] == pytest.approx([0.0, 0.25, 0.5, 0.25])


def test_multiplier_state_restores_the_position():
    multiplier = CosineParamScheduler(1.0, 0.0)
    first = LRMultiplier(sgd(0.1), multiplier, max_iter=20)
    expected = rates(first, 20)
    half = LRMultiplier(sgd(0.1), multiplier, max_iter=20)
    rates(half, 7)
    resumed = LRMultiplier(sgd(0.1), multiplier, max_iter=20)
    resumed.load_state_dict(half.state_dict())
    resumed.optimizer.load_state_dict(half.optimizer.state_dict())
    assert set(half.state_dict()) == {"base_lrs", "last_epoch"}
    assert rates(resumed, 13) == expected[7:]


def test_multiplier_survives_the_step_after_the_last():
    scheduler = LRMultiplier(sgd(), ConstantParamScheduler(1.0), max_iter=3)
    assert rates(scheduler, 4) == [1.0] * 4


def test_multiplier_refuses_a_plain_function():
    with pytest.raises(ValueError, match="ParamScheduler"):
        LRMultiplier(sgd(), lambda where: 1.0, max_iter=3)


def test_old_style_classes_multiply_warmup_and_schedule():
    steps = rates(WarmupMultiStepLR(sgd(), [4, 6], 0.1, 0.5, 2), 8)
    assert steps == pytest.approx([0.5, 0.75, 1, 1, 0.1, 0.1, 0.01, 0.01])
    cosine = rates(WarmupCosineLR(sgd(), 10, 0.5, 2), 10)
    plain = [0.5 * (1 + math.cos(math.pi * i / 10)) for i in range(10)]
    assert cosine == pytest.approx([0.5 * plain[0], 0.75 * plain[1], *plain[2:]])


@pytest.mark.parametrize(
    ("method", "iteration", "factor"),
    [("linear", 0, 0.1), ("linear", 5, 0.55), ("linear", 10, 1), ("constant", 9, 0.1)],
)
def test_warmup_factor(method, iteration, factor):
    assert _get_warmup_factor_at_iter(method, iteration, 10, 0.1) == pytest.approx(factor)


def test_multistep_through_progress_hits_each_milestone():
    schedule = WarmupParamScheduler(MultiStepParamScheduler([1, 0.1], 1000, [900]), 1.0, 0.0)
    scheduler = LRMultiplier(sgd(), schedule, max_iter=1000)
    seen = rates(scheduler, 1000)
    assert (seen[899], seen[900]) == (1, 0.1)
