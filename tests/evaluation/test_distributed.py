"""Two processes that see half the images each give the figures of one."""

import json
import os

import numpy as np
import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from d2kit.data.catalog import MetadataCatalog
from d2kit.evaluation import COCOEvaluator
from d2kit.utils import comm
from tests.evaluation.test_coco_evaluator import run, to_outputs
from tests.support.coco_synthetic import dataset

NAME = "d2kit_test_distributed"


def evaluate(folder, share):
    """Evaluate every `share`-th image; the last image is seen by all."""
    truth = json.loads((folder / "truth.json").read_text())
    mapping = {c["id"]: i for i, c in enumerate(truth["categories"])}
    MetadataCatalog.get(NAME).set(
        json_file=str(folder / "truth.json"),
        thing_classes=[c["name"] for c in truth["categories"]],
        thing_dataset_id_to_contiguous_id=mapping,
    )
    results = json.loads((folder / "results.json").read_text())
    inputs, outputs = to_outputs(truth, results, mapping)
    chosen = sorted({*range(len(inputs))[share], len(inputs) - 1})
    return run(COCOEvaluator(NAME), [inputs[i] for i in chosen], [outputs[i] for i in chosen])


def worker(rank, folder):
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    got = evaluate(folder, slice(rank, None, 2))
    (folder / f"{rank}.json").write_text(json.dumps(got))
    dist.destroy_process_group()


@pytest.fixture
def files(tmp_path):
    truth, results = dataset(7, images=9, detections=10)
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "results.json").write_text(json.dumps(results))
    yield tmp_path
    MetadataCatalog.remove(NAME)


def test_gathered_halves_equal_one_process(files, monkeypatch):
    whole = evaluate(files, slice(None))
    halves = {}

    def send(data, dst=0):
        halves.setdefault(type(data), []).append(data)
        return []

    with monkeypatch.context() as other_process:
        other_process.setattr(comm, "is_main_process", lambda: False)
        other_process.setattr(comm, "gather", send)
        assert evaluate(files, slice(1, None, 2)) == {}
    monkeypatch.setattr(comm, "gather", lambda data, dst=0: [data, *halves[type(data)]])
    np.testing.assert_equal(evaluate(files, slice(0, None, 2)), whole)


@pytest.mark.slow
def test_two_processes_equal_one(files):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    mp.start_processes(worker, (files,), nprocs=2, start_method="spawn")
    first, second = (json.loads((files / f"{rank}.json").read_text()) for rank in (0, 1))
    assert second == {}
    np.testing.assert_equal(first, evaluate(files, slice(None)))
    assert first["segm"]["AP"] > 0
