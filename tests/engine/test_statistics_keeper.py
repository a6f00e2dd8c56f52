"""What a failed step did to BatchNorm is undone."""

import torch
from torch import nn

from d2kit.engine.safety.failure import StatisticsKeeper


def test_statistics_and_counters_are_put_back():
    free = nn.BatchNorm1d(3, track_running_stats=False)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), free, nn.BatchNorm1d(3))
    keeper = StatisticsKeeper(model)
    for _ in range(2):  # it keeps those of the last step
        keeper.before_step()
        before = {name: x.clone() for name, x in model.state_dict().items()}
        model(torch.randn(5, 3))
        assert model[1].num_batches_tracked == before["1.num_batches_tracked"] + 1
    keeper.restore()
    assert before["3.num_batches_tracked"] == 1
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_a_model_without_statistics():
    keeper = StatisticsKeeper(nn.Linear(2, 2))
    keeper.before_step()
    keeper.restore()
