import itertools
import multiprocessing
import os
import random
import signal
import time

import numpy as np
import pytest
import torch
from torch.utils import data as torchdata

from d2kit.config import get_cfg
from d2kit.data import (
    DatasetFromList,
    MapDataset,
    build_batch_data_loader,
    build_detection_test_loader,
    build_detection_train_loader,
)
from d2kit.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from d2kit.utils import comm
from tests.support.fault_runs import patience

SIZES = [(4, 3), (3, 4), (5, 5), (6, 2), (2, 6)]


def records(n=23):
    return [
        {
            "file_name": f"{i}.jpg",
            "image_id": i,
            "width": SIZES[i % 5][0],
            "height": SIZES[i % 5][1],
        }
        for i in range(n)
    ]


def noisy(record):
    """A mapper that draws from all three generators."""
    noise = [random.random(), np.random.rand(), torch.rand(()).item()]
    return {**record, "image": torch.tensor(noise, dtype=torch.float64)}


def make(n=23, batch=4, **kwargs):
    kwargs = {"mapper": noisy, "total_batch_size": batch, "seed": 11, **kwargs}
    return build_detection_train_loader(records(n), **kwargs)


def take(loader, n):
    """Everything that matters of the first `n` batches."""
    return [
        [(d["image_id"], d["sample_seed"], d["image"].tolist()) for d in batch]
        for batch in itertools.islice(loader, n)
    ]


def ids(loader, n):
    return [[d["image_id"] for d in batch] for batch in itertools.islice(loader, n)]


@pytest.fixture
def processes(monkeypatch):
    """Return a function that pretends to be a process among several."""

    def pretend(rank, world_size):
        monkeypatch.setattr(comm, "get_rank", lambda: rank)
        monkeypatch.setattr(comm, "get_world_size", lambda: world_size)

    return pretend


@pytest.mark.faults(2, fast=True)
@pytest.mark.parametrize("grouping", [True, False])
def test_number_of_workers_changes_nothing(grouping):
    want = take(make(num_workers=0, aspect_ratio_grouping=grouping), 14)
    for workers in (4, 2):
        random.seed(workers)
        torch.manual_seed(workers)
        loader = make(num_workers=workers, aspect_ratio_grouping=grouping)
        assert take(loader, 14) == want
    assert take(make(seed=12, aspect_ratio_grouping=grouping), 14) != want


@pytest.mark.faults(7, fast=True)
@pytest.mark.parametrize("grouping", [True, False])
@pytest.mark.parametrize("start", [1, 5, 6, 7, 40])
def test_start_batch_equals_skipping(grouping, start):
    want = take(make(aspect_ratio_grouping=grouping), start + 8)
    assert take(make(aspect_ratio_grouping=grouping, start_batch=start), 8) == want[start:]
    loader = make(aspect_ratio_grouping=grouping)
    loader.start_batch = start
    assert loader.start_batch == start
    assert take(loader, 8) == want[start:]
    assert take(loader, 8) == want[start:]
    with pytest.raises(ValueError, match="start_batch"):
        loader.start_batch = -1


@pytest.mark.faults(7, fast=True)
def test_start_batch_opens_no_image():
    opened = []

    def mapper(record):
        opened.append(record["image_id"])
        return noisy(record)

    next(iter(make(mapper=mapper, start_batch=1000)))
    assert len(opened) == 4


@pytest.mark.faults(3, fast=True)
@pytest.mark.parametrize("grouping", [True, False])
@pytest.mark.parametrize("world_size", [2, 4])
def test_number_of_processes_changes_nothing(grouping, world_size, processes):
    want = take(make(batch=8, aspect_ratio_grouping=grouping), 12)
    shares = []
    for rank in range(world_size):
        processes(rank, world_size)
        shares.append(take(make(batch=8, aspect_ratio_grouping=grouping), 12))
    together = [list(itertools.chain(*parts)) for parts in zip(*shares, strict=True)]
    assert together == want


@pytest.mark.parametrize(
    "sampler",
    [
        None,
        lambda: TrainingSampler(23, shuffle=False),
        lambda: RepeatFactorTrainingSampler([1.5] * 23, seed=2),
    ],
)
def test_batches_hold_one_shape_and_use_every_sample(sampler):
    sampler = sampler() if sampler else TrainingSampler(23, seed=11)
    loader = make(sampler=sampler)
    batches = list(itertools.islice(loader, 60))
    assert all(len({d["width"] > d["height"] for d in b}) == 1 for b in batches)
    for wide in (True, False):
        got = [d["image_id"] for b in batches for d in b if (d["width"] > d["height"]) == wide]
        shapes = [SIZES[i % 5] for i in range(23)]
        stream = itertools.islice(sampler.stream(), 500)
        want = [i for i in stream if (shapes[i][0] > shapes[i][1]) == wide]
        assert got == want[: len(got)]


def test_ungrouped_batches_follow_the_stream():
    want = list(itertools.islice(TrainingSampler(23, seed=11).stream(), 40))
    got = ids(make(aspect_ratio_grouping=False), 10)
    assert list(itertools.chain(*got)) == want


def test_samples_of_an_epoch_differ_between_epochs():
    batches = take(make(n=4, aspect_ratio_grouping=False), 6)
    noise = {tuple(d[2]) for batch in batches for d in batch}
    seeds = {d[1] for batch in batches for d in batch}
    assert len(noise) == len(seeds) == 24


def test_global_generators_are_left_alone():
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    want = random.random(), np.random.rand(), torch.rand(()).item()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    take(make(), 3)
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == want


@pytest.mark.faults(7, fast=True)
def test_start_far_away_is_fast():
    shape = np.random.default_rng(0).integers(1, 3, (118_000, 2)).tolist()
    dataset = DatasetFromList([{"width": w, "height": h, "image_id": 0} for w, h in shape])
    begin = time.process_time()
    loader = build_detection_train_loader(
        dataset, mapper=None, total_batch_size=16, seed=0, start_batch=90_000
    )
    next(iter(loader))
    assert time.process_time() - begin < 1.0


class OwnSampler(torchdata.Sampler):
    """A finite sampler of a user, without a global stream."""

    def __init__(self, indices):
        self.indices = indices

    def __iter__(self):
        return iter(self.indices)


class Reversed(TrainingSampler):
    """A sampler of a user that inherits a stream, but orders by itself."""

    def __iter__(self):
        return iter(range(22, -1, -1))


def test_own_sampler_is_iterated_as_it_is(processes):
    loader = make(sampler=OwnSampler(list(range(10))), aspect_ratio_grouping=False)
    assert ids(loader, 5) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    loader = make(sampler=Reversed(23, seed=0), aspect_ratio_grouping=False, start_batch=1)
    assert ids(loader, 2) == [[18, 17, 16, 15], [14, 13, 12, 11]]
    processes(1, 2)
    loader = make(sampler=OwnSampler(list(range(10))), aspect_ratio_grouping=False)
    assert ids(loader, 2) == [[0, 1], [2, 3]]
    seeds = [d[1] for b in take(loader, 2) for d in b]
    processes(0, 2)
    assert not set(seeds) & {d[1] for b in take(loader, 2) for d in b} or len(set(seeds)) == 4


def test_last_batch_can_be_kept():
    dataset = MapDataset(DatasetFromList(records()), noisy)
    for grouping in (True, False):
        loader = build_batch_data_loader(
            dataset,
            OwnSampler(list(range(10))),
            4,
            aspect_ratio_grouping=grouping,
            drop_last=False,
            seed=0,
        )
        assert sorted(itertools.chain(*ids(loader, 9))) == list(range(10))


def test_single_gpu_batch_size(processes):
    processes(0, 2)
    dataset = MapDataset(DatasetFromList(records()), noisy)
    sampler = TrainingSampler(23, seed=0)
    loader = build_batch_data_loader(dataset, sampler, None, single_gpu_batch_size=3, seed=0)
    assert len(next(iter(loader))) == 3
    with pytest.raises(ValueError, match="not both"):
        build_batch_data_loader(dataset, sampler, 4, single_gpu_batch_size=3)


class Opaque(torchdata.Dataset):
    """A dataset of a user that does not know the sizes of its images beforehand."""

    def __len__(self):
        return 23

    def __getitem__(self, i):
        return records()[i]


def test_grouping_of_a_dataset_without_sizes():
    loader = build_detection_train_loader(Opaque(), mapper=noisy, total_batch_size=4, seed=1)
    batches = list(itertools.islice(loader, 10))
    assert all(len({d["width"] > d["height"] for d in b}) == 1 and len(b) == 4 for b in batches)
    again = build_detection_train_loader(
        Opaque(), mapper=noisy, total_batch_size=4, seed=1, num_workers=2
    )
    assert take(again, 10) == take(loader, 10)
    with pytest.raises(ValueError, match="without decoding"):
        build_detection_train_loader(
            Opaque(), mapper=noisy, total_batch_size=4, seed=1, start_batch=2
        )


class Stream(torchdata.IterableDataset):
    def __iter__(self):
        return iter(records(20))


@pytest.mark.parametrize("grouping", [True, False])
def test_iterable_dataset(grouping):
    loader = build_detection_train_loader(
        Stream(), mapper=noisy, total_batch_size=4, aspect_ratio_grouping=grouping
    )
    batches = ids(loader, 99)
    assert all(len(b) == 4 for b in batches)
    assert grouping or batches == np.arange(20).reshape(5, 4).tolist()
    assert loader.start_batch == 0
    with pytest.raises(ValueError, match="start_batch=3"):
        loader.start_batch = 3
    with pytest.raises(ValueError, match="sampler=None"):
        build_detection_train_loader(
            Stream(), mapper=None, total_batch_size=4, sampler=TrainingSampler(3)
        )


@pytest.mark.parametrize(("batch", "world_size"), [(5, 2), (0, 1), (-4, 1), (2, 4)])
def test_batch_size_that_does_not_fit(batch, world_size, processes):
    processes(0, world_size)
    with pytest.raises(ValueError, match=rf"IMS_PER_BATCH.*got {batch} for {world_size} processes"):
        make(batch=batch)


def test_empty_dataset():
    with pytest.raises(ValueError, match="empty"):
        make(n=0)


def test_collate_and_no_mapper():
    loader = make(mapper=None, collate_fn=len)
    assert next(iter(loader)) == 4
    sample = next(iter(make(mapper=None)))[0]
    assert set(sample) == {*records(1)[0], "sample_seed"}


def failing(record):
    if record["image_id"] == 3:
        raise OSError("truncated")
    return noisy(record)


@pytest.mark.faults(27, fast=True)
@pytest.mark.parametrize("workers", [0, 2])
def test_failing_mapper_names_the_image(workers):
    loader = make(mapper=failing, num_workers=workers)
    with pytest.raises(RuntimeError, match=r"file_name '3\.jpg': OSError: truncated"):
        take(loader, 20)


def dying(record):
    if record["image_id"] == 3 and torchdata.get_worker_info():
        os.kill(os.getpid(), signal.SIGKILL)
    return noisy(record)


@pytest.mark.faults(27)
@pytest.mark.parametrize("workers", [0, 2])
def test_failing_mapper_is_quick(workers):
    begin = time.perf_counter()
    with pytest.raises(RuntimeError, match=r"file_name '3\.jpg': OSError: truncated"):
        take(make(mapper=failing, num_workers=workers), 20)
    assert time.perf_counter() - begin < patience(10)


@pytest.mark.faults(27, fast=True)
def test_workers_end_with_the_error():
    with pytest.raises(RuntimeError, match="truncated") as error:
        take(make(mapper=failing, num_workers=2), 20)
    assert error.value.__traceback__  # which holds the iterator
    assert not multiprocessing.active_children()


@pytest.mark.faults(27)
@pytest.mark.parametrize("other_loader", [False, True], ids=["alone", "after another loader"])
def test_killed_worker_is_an_error_that_names_images(other_loader):
    if other_loader:  # torch's handler of SIGCHLD then raises in place of the queue
        assert len(list(torchdata.DataLoader([1, 2], num_workers=1))) == 2
    begin = time.perf_counter()
    with pytest.raises(RuntimeError, match=r"In work: record 3, file_name '3\.jpg'$"):
        take(make(mapper=dying, num_workers=1), 20)
    assert time.perf_counter() - begin < patience(10)


def config(**changes):
    cfg = get_cfg()
    cfg.SOLVER.IMS_PER_BATCH = 4
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SEED = 11
    cfg.merge_from_list(list(itertools.chain(*changes.items())))
    return cfg


def test_train_loader_from_config():
    loader = build_detection_train_loader(config(), mapper=noisy, dataset=records())
    want = take(make(), 6)
    assert take(loader, 6) == want
    later = build_detection_train_loader(
        config(), mapper=noisy, dataset=records(), start_batch=2, total_batch_size=4
    )
    assert take(later, 4) == want[2:]
    other = build_detection_train_loader(config(), mapper=noisy, dataset=records(), seed=12)
    assert take(other, 6) == take(make(seed=12), 6)


@pytest.mark.parametrize("name", ["RepeatFactorTrainingSampler", "RandomSubsetTrainingSampler"])
def test_other_samplers_from_config(name):
    cfg = config(**{"DATALOADER.SAMPLER_TRAIN": name, "DATALOADER.REPEAT_THRESHOLD": 0.5})
    data = [{**r, "annotations": [{"category_id": r["image_id"] == 0}]} for r in records()]
    loader = build_detection_train_loader(cfg, mapper=noisy, dataset=data)
    assert len(next(iter(loader))) == 4


def test_misspelt_sampler():
    cfg = config(**{"DATALOADER.SAMPLER_TRAIN": "TrainSampler"})
    with pytest.raises(ValueError, match="nearest: TrainingSampler"):
        build_detection_train_loader(cfg, mapper=noisy, dataset=records())


@pytest.mark.parametrize("workers", [0, 2])
def test_test_loader(workers, processes):
    loader = build_detection_test_loader(
        records(5), mapper=noisy, batch_size=2, num_workers=workers
    )
    assert ids(loader, 9) == [[0, 1], [2, 3], [4]]
    processes(1, 2)
    assert ids(build_detection_test_loader(records(5), mapper=noisy), 9) == [[3], [4]]
    assert ids(build_detection_test_loader(Stream(), mapper=noisy, batch_size=20), 9)[0][-1] == 19
