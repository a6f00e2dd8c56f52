"""The config of a run: decided once, told in one table."""

import logging

import pytest
import torch

from d2kit.engine.resolve import Change, choose_precision, describe_changes
from tests.support import tiny_run as tiny


@pytest.fixture(autouse=True)
def images(tmp_path):
    tiny.register(tmp_path)


def resolved(tmp_path, caplog, *options):
    with caplog.at_level(logging.INFO):
        trainer = tiny.TinyTrainer(tiny.tiny_cfg(tmp_path, *options))
    tables = [r.getMessage() for r in caplog.records if "that the run sets" in r.getMessage()]
    return trainer, tables


def native(monkeypatch, answer):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: answer)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")


BF16 = ("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "bfloat16")


def test_everything_that_changes_stands_in_one_table(tmp_path, caplog, monkeypatch):
    native(monkeypatch, False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = ("SOLVER.REFERENCE_BATCH", 16, "SOLVER.MAX_EPOCHS", 3.0, "MODEL.DEVICE", "cuda")
    trainer, tables = resolved(tmp_path, caplog, *options, *BF16, "SEED", -1)
    assert len(tables) == 1
    solver = trainer.cfg.SOLVER
    for key, value in {
        "SOLVER.BASE_LR": f"{solver.BASE_LR:.6g}",
        "SOLVER.MAX_ITER": str(solver.MAX_ITER),
        "SEED": str(trainer.seed),
        "MODEL.DEVICE": "cpu",
        "SOLVER.AMP.ENABLED": "False",
    }.items():
        line = next(x for x in tables[0].splitlines() if x.startswith(f"{key} "))
        assert value in line.split()
    assert solver.MAX_EPOCHS == 3
    assert trainer.cfg.is_frozen()


def test_a_run_that_changes_nothing_says_nothing(tmp_path, caplog):
    first, _ = resolved(tmp_path, caplog, "SEED", 3)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        again = tiny.TinyTrainer(first.cfg)
    assert "that the run sets" not in caplog.text
    assert again.cfg == first.cfg


@pytest.mark.parametrize("answer", [True, False])
def test_bfloat16_only_where_it_is_native(answer, tmp_path, caplog, monkeypatch):
    native(monkeypatch, answer)
    trainer, _ = resolved(tmp_path, caplog, *BF16)
    assert (type(trainer._trainer).__name__ == "AMPTrainer") is answer
    lines = [m for r in caplog.records if "float32" in (m := r.getMessage()) and "bfloat16" in m]
    assert bool(lines) is not answer


def test_float16_is_used_as_configured():
    assert choose_precision("float16", torch.device("cpu")) is torch.float16
    with pytest.raises(ValueError, match=r"SOLVER\.AMP\.PRECISION"):
        choose_precision("half", torch.device("cpu"))


def test_long_values_are_shortened():
    table = describe_changes([Change("MODEL.CLASS_NAMES", [], ["name"] * 99, "names")])
    assert max(map(len, table.splitlines())) < 120
    assert "..." in table
