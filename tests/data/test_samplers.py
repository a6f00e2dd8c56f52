import itertools
import json
import time

import numpy as np
import pytest
import torch

from d2kit.data.samplers import (
    GroupedBatchSampler,
    InferenceSampler,
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from d2kit.utils import comm
from tests.support.reference_files import reference_path


def first(iterable, n):
    return list(itertools.islice(iterable, n))


@pytest.fixture(scope="module")
def reference():
    return json.loads(reference_path("ops/samplers.json").read_text())


@pytest.fixture(scope="module")
def images(reference):
    return [{"annotations": [{"category_id": c} for c in cs]} for cs in reference["categories"]]


def test_training_sampler_equals_reference(reference):
    want = reference["training_sampler_size10_seed42_first35"]
    assert first(TrainingSampler(10, seed=42), 35) == want
    assert first(TrainingSampler(4, shuffle=False), 10) == reference["training_sampler_noshuffle"]


def test_repeat_factors_equal_reference(reference, images):
    factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
        images, reference["repeat_thresh"]
    )
    torch.testing.assert_close(factors, torch.tensor(reference["repeat_factors"]))
    sampler = RepeatFactorTrainingSampler(factors, seed=3)
    assert first(sampler, 60) == reference["repeat_sampler_seed3_first60"]


def test_repeat_factors_without_square_root(images):
    make = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency
    torch.testing.assert_close(make(images, 0.3, sqrt=False), make(images, 0.3) ** 2)


def test_inference_sampler_equals_reference(reference):
    splits = [list(InferenceSampler._get_local_indices(10, 4, r)) for r in range(4)]
    assert splits == reference["inference_splits_10_by_4"]
    assert list(InferenceSampler(5)) == [0, 1, 2, 3, 4]
    assert len(InferenceSampler(5)) == 5


SAMPLERS = {
    "training": lambda: TrainingSampler(7, seed=1),
    "ordered": lambda: TrainingSampler(3, shuffle=False, seed=0),
    "repeat": lambda: RepeatFactorTrainingSampler([1.5, 0.2, 3.0, 1.0], seed=1),
    "subset": lambda: RandomSubsetTrainingSampler(10, 0.5, seed_shuffle=1, seed_subset=2),
}


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("start", [0, 1, 6, 7, 8, 50])
def test_stream_starts_anywhere(name, start):
    whole = first(SAMPLERS[name]().stream(), 80)
    assert first(SAMPLERS[name]().stream(start), 30) == whole[start : start + 30]
    assert first(SAMPLERS[name](), 80) == whole


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", SAMPLERS)
def test_shares_of_processes_interleave_to_the_stream(name, world_size, monkeypatch):
    whole = first(SAMPLERS[name]().stream(), 12 * world_size)
    monkeypatch.setattr(comm, "get_world_size", lambda: world_size)
    for rank in range(world_size):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        assert first(SAMPLERS[name](), 12) == whole[rank::world_size]


def test_stream_far_into_a_large_dataset_is_fast():
    begin = time.process_time()
    first(TrainingSampler(118_000, seed=0).stream(1_440_000), 16)
    assert time.process_time() - begin < 1.0


def test_subset_is_fixed_and_of_the_right_size():
    seen = first(RandomSubsetTrainingSampler(20, 0.3, seed_shuffle=5, seed_subset=6), 60)
    assert len(set(seen)) == 6
    assert all(set(seen[i : i + 6]) == set(seen) for i in range(0, 60, 6))
    other = first(RandomSubsetTrainingSampler(20, 0.3, seed_shuffle=7, seed_subset=6), 60)
    assert set(other) == set(seen)
    assert other != seen


def test_repeat_factor_mean():
    epochs = RepeatFactorTrainingSampler([1.0, 2.5, 0.5], seed=0).epochs()
    counts = np.mean([np.bincount(next(epochs), minlength=3) for _ in range(2000)], axis=0)
    assert np.allclose(counts, [1.0, 2.5, 0.5], atol=0.05)


def test_grouped_batches_hold_one_group_in_order():
    sampler = TrainingSampler(10, seed=0)
    groups = [0, 1] * 5
    batches = first(GroupedBatchSampler(sampler, groups, 3), 20)
    assert all(len({groups[i] for i in b}) == 1 and len(b) == 3 for b in batches)
    for group in (0, 1):
        got = [i for b in batches for i in b if groups[i] == group]
        assert got == [i for i in first(sampler, 200) if groups[i] == group][: len(got)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainingSampler(0), "empty"),
        (lambda: TrainingSampler(2.5), "records"),
        (lambda: InferenceSampler(0), "empty"),
        (lambda: RandomSubsetTrainingSampler(3, 0.1), "subset_ratio"),
        (lambda: RandomSubsetTrainingSampler(3, 1.5), "subset_ratio"),
        (lambda: RepeatFactorTrainingSampler([]), "> 0"),
        (lambda: RepeatFactorTrainingSampler([1.0, float("nan")]), "finite"),
        (lambda: GroupedBatchSampler([1, 2], [0, 0], 2), "Sampler"),
        (lambda: TrainingSampler(3).stream(-1), "start"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
