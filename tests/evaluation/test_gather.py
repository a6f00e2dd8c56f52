import os

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from d2kit.evaluation.evaluator import gather_on_main, once_per_image


def worker(rank, folder):
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    got = [gather_on_main([rank, 10 + rank]), gather_on_main([rank], distributed=False)]
    (folder / f"{rank}.txt").write_text(repr(got))
    dist.destroy_process_group()


@pytest.mark.slow
def test_main_process_gets_all(tmp_path):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    mp.start_processes(worker, (tmp_path,), nprocs=2, start_method="spawn")
    got = [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)]
    assert got == ["[[0, 10, 1, 11], [0]]", "[None, [1]]"]


def test_one_process():
    assert gather_on_main([1, 2]) == [1, 2]
    assert gather_on_main([]) == []


def test_first_prediction_of_an_image_counts(caplog):
    rows = [{"image_id": 1, "a": 0}, {"image_id": "x"}, {"image_id": 1, "a": 5}]
    assert once_per_image(rows) == rows[:2]
    assert "1 image(s) were processed more than once" in caplog.text
    assert once_per_image([]) == []
