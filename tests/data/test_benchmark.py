import time

import pytest

from d2kit.data.benchmark import DataLoaderBenchmark


def slow(record):
    time.sleep(0.005)
    return record


def make(**settings):
    arguments = {"mapper": slow, "total_batch_size": 4, **settings}
    return DataLoaderBenchmark([{"number": i} for i in range(10)], **arguments)


def test_each_stage_is_measured(caplog):
    benchmark = make()
    with caplog.at_level("INFO"):
        alone = benchmark.benchmark_dataset(20)
        mapped = benchmark.benchmark_mapper(5, warmup=1)
        batch = benchmark.benchmark_workers(3, warmup=1)
        ready = benchmark.benchmark_IPC(5, warmup=1)
        together = benchmark.benchmark_distributed(2, warmup=1)
    assert 0 < alone < 0.005 <= mapped
    assert list(batch) == [0]
    assert min(batch[0], together) >= 4 * 0.005 > ready
    assert "mapper, one process" in caplog.text
    assert "5 steps" in caplog.text


def test_workers_are_measured_with_one_and_many():
    assert list(make(num_workers=2).benchmark_workers(2, warmup=1)) == [2, 1]


def test_time_limit(caplog):
    with caplog.at_level("INFO"):
        make(max_time_seconds=0).benchmark_mapper(1000, warmup=0)
    assert "1 steps" in caplog.text


def test_finite_sampler_ends():
    with pytest.raises(ValueError, match="within the 5 steps of warm-up"):
        make(sampler=[0, 1]).benchmark_dataset(3)
