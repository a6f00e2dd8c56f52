"""Batch, rate and schedule of a config follow the batch and the number of processes."""

import pytest

from d2kit.config import get_cfg
from d2kit.engine import DefaultTrainer, default_argument_parser, default_setup
from tests.support import tiny_run as tiny


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    tiny.register(folder)
    return folder


@pytest.mark.parametrize("frozen", [False, True])
def test_auto_scale_workers(frozen):
    cfg = get_cfg()
    cfg.merge_from_list(
        ["SOLVER.REFERENCE_WORLD_SIZE", 8, "SOLVER.IMS_PER_BATCH", 16, "SOLVER.BASE_LR", 0.02]
        + ["SOLVER.MAX_ITER", 90000, "SOLVER.STEPS", (60000, 80000), "TEST.EVAL_PERIOD", 5000]
    )
    if frozen:
        cfg.freeze()
    scaled = DefaultTrainer.auto_scale_workers(cfg, 2)
    solver = scaled.SOLVER
    assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.MAX_ITER) == (4, 0.005, 360000)
    assert (solver.STEPS, solver.WARMUP_ITERS) == ((240000, 320000), 4000)
    assert (scaled.TEST.EVAL_PERIOD, solver.REFERENCE_WORLD_SIZE) == (20000, 2)
    assert scaled.is_frozen() == frozen
    assert cfg.SOLVER.IMS_PER_BATCH == 16
    assert DefaultTrainer.auto_scale_workers(scaled, 2) is scaled


def test_scaling_refuses_an_uneven_batch():
    cfg = get_cfg()
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 3
    with pytest.raises(ValueError, match="not a multiple"):
        DefaultTrainer.auto_scale_workers(cfg, 2)


def rate(*options):
    cfg = get_cfg()
    cfg.merge_from_list(["SOLVER.BASE_LR", 0.02, "SOLVER.IMS_PER_BATCH", 4, *options])
    return cfg


REFERENCE = ("SOLVER.REFERENCE_BATCH", 16)


@pytest.mark.parametrize("frozen", [False, True])
def test_rate_follows_the_batch_once(frozen):
    cfg = rate(*REFERENCE)
    if frozen:
        cfg.freeze()
    scaled = DefaultTrainer.auto_scale_workers(cfg, 1)
    assert (scaled.SOLVER.BASE_LR, scaled.SOLVER.IMS_PER_BATCH) == (0.005, 4)
    assert scaled.SOLVER.MAX_ITER == cfg.SOLVER.MAX_ITER
    assert scaled.is_frozen() == frozen
    assert cfg.SOLVER.BASE_LR == 0.02
    again = get_cfg()
    again.merge_from_other_cfg(scaled)  # as a config.yaml of the scaled config
    assert DefaultTrainer.auto_scale_workers(again, 1) is again


@pytest.mark.parametrize("reference", [0, 4])
def test_rate_stays_without_or_at_the_reference(reference):
    cfg = rate("SOLVER.REFERENCE_BATCH", reference)
    assert DefaultTrainer.auto_scale_workers(cfg, 1) is cfg


@pytest.mark.parametrize(("world", "processes", "batch"), [(0, 2, 4), (1, 2, 8), (2, 1, 2)])
def test_batch_and_processes_scale_the_rate_once(world, processes, batch):
    """Whatever the way to it, the rate is 0.02 / 16 per image."""
    cfg = rate(*REFERENCE, "SOLVER.REFERENCE_WORLD_SIZE", world)
    scaled = DefaultTrainer.auto_scale_workers(cfg, processes)
    assert batch == scaled.SOLVER.IMS_PER_BATCH
    assert pytest.approx(0.02 / 16 * batch) == scaled.SOLVER.BASE_LR
    assert DefaultTrainer.auto_scale_workers(scaled, processes) is scaled
    more = DefaultTrainer.auto_scale_workers(scaled, 4 * processes)
    assert pytest.approx(0.02 / 16 * more.SOLVER.IMS_PER_BATCH) == more.SOLVER.BASE_LR


def test_a_resumed_run_scales_the_rate_once(tmp_path, images):
    """Also from the config.yaml of the run."""
    options = ("SOLVER.REFERENCE_BATCH", 1, "SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2)
    cfg = tiny.tiny_cfg(tmp_path / "a", *options, "SOLVER.BASE_LR", 0.05)
    default_setup(cfg, default_argument_parser().parse_args([]))
    tiny.TinyTrainer(cfg).train()
    read = get_cfg()
    read.merge_from_file(tmp_path / "a" / "config.yaml")
    for again in (read, cfg):
        for newer in ("model_final.pth", "model_0000003.pth"):
            (tmp_path / "a" / newer).unlink()
        trainer = tiny.TinyTrainer(again)
        trainer.resume_or_load()
        assert trainer.start_iter == 2
        assert trainer.cfg.SOLVER.BASE_LR == 0.1
        trainer.train()
    tiny.TinyTrainer(tiny.tiny_cfg(tmp_path / "b", *options[2:])).train()  # BASE_LR is 0.1
    assert tiny.final_state(tmp_path / "a") == tiny.final_state(tmp_path / "b")


def test_a_negative_reference_is_refused():
    with pytest.raises(ValueError, match="SOLVER.REFERENCE_BATCH: expected the number of images"):
        DefaultTrainer.auto_scale_workers(rate("SOLVER.REFERENCE_BATCH", -1), 1)
