import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from d2kit.layers import (
    CycleBatchNormList,
    FrozenBatchNorm2d,
    LayerNorm,
    NaiveSyncBatchNorm,
    SyncBatchNorm,
    get_norm,
)


def trained(bn):
    with torch.no_grad():
        for value in (bn.weight, bn.bias, bn.running_mean, bn.running_var):
            value.uniform_(0.5, 2.0)
    return bn.eval()


@pytest.mark.parametrize("grad", [True, False])
def test_frozen_is_batch_norm_in_evaluation(grad):
    bn = trained(nn.BatchNorm2d(6, eps=1e-3))
    frozen = FrozenBatchNorm2d.convert_frozen_batchnorm(bn)
    assert isinstance(frozen, FrozenBatchNorm2d)
    x = torch.randn(2, 6, 5, 7, requires_grad=grad)
    torch.testing.assert_close(frozen(x), bn(x), rtol=1e-5, atol=1e-5)
    frozen.train()
    torch.testing.assert_close(frozen(x), bn(x), rtol=1e-5, atol=1e-5)
    assert not list(frozen.parameters())
    assert frozen(x.bfloat16()).dtype == torch.bfloat16


def test_frozen_state():
    frozen = FrozenBatchNorm2d(4)
    assert list(frozen.state_dict()) == ["weight", "bias", "running_mean", "running_var"]
    x = torch.randn(1, 4, 3, 3)
    torch.testing.assert_close(frozen(x), x)
    state = trained(nn.BatchNorm2d(4)).state_dict()
    frozen.load_state_dict(state)  # with the step counter of a trained one
    assert torch.equal(frozen.running_var, state["running_var"])
    assert "num_batches_tracked" in state
    with pytest.raises(RuntimeError, match="running_mean"):
        frozen.load_state_dict({"weight": torch.ones(4), "bias": torch.ones(4)})
    assert repr(frozen) == "FrozenBatchNorm2d(num_features=4, eps=1e-05)"


def test_conversion_of_a_model_and_back():
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(trained(nn.BatchNorm2d(4))))

    model, x = make().eval(), torch.randn(2, 3, 4, 4)
    expected, names = model(x), set(model.state_dict())
    assert FrozenBatchNorm2d.convert_frozen_batchnorm(model) is model
    assert isinstance(model[1][0], FrozenBatchNorm2d)
    torch.testing.assert_close(model(x), expected)
    FrozenBatchNorm2d.convert_frozenbatchnorm2d_to_batchnorm2d(model)
    assert isinstance(model[1][0], nn.BatchNorm2d)
    assert not model[1][0].training
    assert set(model.state_dict()) == names
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("BN", nn.BatchNorm2d),
        ("FrozenBN", FrozenBatchNorm2d),
        ("GN", nn.GroupNorm),
        ("nnSyncBN", nn.SyncBatchNorm),
        ("naiveSyncBN", NaiveSyncBatchNorm),
        ("naiveSyncBN_N", NaiveSyncBatchNorm),
        ("LN", LayerNorm),
        ("SyncBN", SyncBatchNorm),
        (nn.InstanceNorm2d, nn.InstanceNorm2d),
    ],
)
def test_get_norm(name, kind):
    norm = get_norm(name, 64)
    assert type(norm) is kind
    if kind is nn.GroupNorm:
        assert norm.num_groups == 32
    if kind is not nn.SyncBatchNorm:
        assert norm(torch.randn(2, 64, 4, 4)).shape == (2, 64, 4, 4)


def test_get_norm_of_nothing_and_of_a_misspelling():
    assert get_norm("", 4) is None
    assert get_norm(None, 4) is None
    with pytest.raises(ValueError, match=r"unknown norm 'FrozenNB'; nearest: \['FrozenBN'"):
        get_norm("FrozenNB", 4)
    with pytest.raises(ValueError, match="stats_mode"):
        NaiveSyncBatchNorm(4, stats_mode="M")


def test_layer_norm_is_over_channels():
    out = LayerNorm(8)(torch.randn(2, 8, 3, 5))
    torch.testing.assert_close(out.mean(dim=1), torch.zeros(2, 3, 5), rtol=0, atol=1e-5)
    expected = torch.ones(2, 3, 5)
    torch.testing.assert_close(out.var(dim=1, unbiased=False), expected, rtol=1e-3, atol=1e-3)


def test_cycle_uses_each_norm_in_turn():
    cycle = CycleBatchNormList(2, num_features=3)
    assert "weight" in cycle.state_dict()
    assert "1.running_mean" in cycle.state_dict()
    assert "1.weight" not in cycle.state_dict()
    low, high = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 10.0)
    for x in (low, high, low):
        assert cycle(x).shape == x.shape
    assert cycle[0].running_mean.tolist() == [0, 0, 0]
    assert cycle[1].running_mean.tolist() == [1, 1, 1]
    assert cycle.extra_repr() == "affine=True"


SYNC_CASES = [("", (2, 2)), ("N", (3, 1)), ("N", (4, 0))]  # stats_mode, images per process


def _sync_worker(rank, folder):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    results = []
    for mode, sizes in SYNC_CASES:
        x = torch.load(f"{folder}/x.pt")[sum(sizes[:rank]) : sum(sizes[: rank + 1])]
        x.requires_grad_()
        norm = NaiveSyncBatchNorm(3, stats_mode=mode)
        out = norm(x)
        (out.square() * torch.arange(5.0)).sum().backward()
        results.append((out.detach(), x.grad, norm.running_mean))
    torch.save(results, f"{folder}/out{rank}.pt")
    torch.distributed.destroy_process_group()


def test_naive_sync_on_two_processes_is_one_on_the_whole_batch(tmp_path):
    x = torch.randn(4, 3, 4, 5) * 3 + 1
    torch.save(x, tmp_path / "x.pt")
    mp.spawn(_sync_worker, args=(str(tmp_path),), nprocs=2)
    x.requires_grad_()
    norm = nn.BatchNorm2d(3)
    out = norm(x)
    (out.square() * torch.arange(5.0)).sum().backward()
    both = [torch.load(tmp_path / f"out{rank}.pt") for rank in (0, 1)]
    for parts in zip(*both, strict=True):
        torch.testing.assert_close(torch.cat([p[0] for p in parts]), out, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.cat([p[1] for p in parts]), x.grad, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(parts[0][2], norm.running_mean, rtol=1e-4, atol=1e-5)
        assert torch.equal(parts[0][2], parts[1][2])
