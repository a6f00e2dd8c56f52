import contextlib
import random
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from d2kit.utils import env


def draws():
    return random.random(), np.random.rand(), float(torch.rand(()))


def test_seed_all_rng():
    env.seed_all_rng(7)
    first = draws()
    env.seed_all_rng(7)
    assert draws() == first
    env.seed_all_rng(2**40 + 7)
    assert draws() != first
    env.seed_all_rng()
    a = draws()
    env.seed_all_rng(-1)
    assert draws() != a


@given(st.lists(st.integers(-(2**70), 2**70), max_size=4))
def test_derive_seed_is_a_63_bit_function(numbers):
    seed = env.derive_seed(*numbers)
    assert 0 <= seed < 2**63
    assert env.derive_seed(*numbers) == seed


def test_derive_seed_is_stable_and_separates():
    assert env.derive_seed(1, 2) == 8854627303482016855  # on every machine, for ever
    seeds = {env.derive_seed(a, b) for a in range(50) for b in range(50)}
    assert len(seeds) == 2500
    assert env.derive_seed(1, 23) != env.derive_seed(12, 3)
    assert env.derive_seed(np.int64(3), True) == env.derive_seed(3, 1)


def test_rng_scope_depends_on_its_numbers_only_and_leaves_no_trace():
    env.seed_all_rng(1)
    draws()
    with env.rng_scope(5, 6):
        first = draws()
    env.seed_all_rng(2)
    draws()
    expected = draws()
    env.seed_all_rng(2)
    draws()
    with env.rng_scope(5, 6):
        assert draws() == first
    assert draws() == expected
    with env.rng_scope(5, 7):
        assert draws() != first


def test_rng_scope_restores_after_an_error():
    env.seed_all_rng(3)
    expected = draws()
    env.seed_all_rng(3)
    with contextlib.suppress(ZeroDivisionError), env.rng_scope(1):
        draws()
        raise ZeroDivisionError
    assert draws() == expected


def test_torch_version():
    assert env.TORCH_VERSION >= (2, 10)
    assert torch.__version__.startswith(".".join(map(str, env.TORCH_VERSION)))


def test_setup_environment(monkeypatch):
    env.setup_environment()
    module = types.ModuleType("env_module_of_test")
    calls = []
    module.setup_environment = lambda: calls.append(1)
    monkeypatch.setitem(sys.modules, "env_module_of_test", module)
    monkeypatch.setenv("D2KIT_ENV_MODULE", "env_module_of_test")
    env.setup_environment()
    assert calls == [1]
    monkeypatch.setattr(env, "TORCH_VERSION", (2, 9))
    with pytest.raises(RuntimeError, match=r"2\.10"):
        env.setup_environment()


def test_fixup_module_metadata():
    namespace = {
        "env": types.SimpleNamespace(),
        "theirs": np.asarray,
        "ours": type("Ours", (), {"__module__": "package._private"}),
        "_hidden": type("Hidden", (), {"__module__": "package._private"}),
    }
    env.fixup_module_metadata("package.public", namespace)
    assert namespace["ours"].__module__ == "package.public"
    assert namespace["_hidden"].__module__ == "package._private"
    assert namespace["theirs"].__module__ == "numpy"
    env.fixup_module_metadata("package.public", namespace, ["_hidden"])
    assert namespace["_hidden"].__module__ == "package.public"
